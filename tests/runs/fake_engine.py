"""An engine without a process, for tests of what a watcher makes of one. mypy holds it to the
protocol.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.runs.worker.engine_process import Engine


class FakeEngine:
    """It has ended with `exit_code`, or, without one, does nothing that it is asked to."""

    def __init__(self, exit_code: int | None = None, *, killed_for_memory: bool = False) -> None:
        self.exit_code = exit_code
        self.killed_for_memory = killed_for_memory
        self.pid: int | None = None
        self.requests: list[str | signal.Signals] = []

    def start(self, device: dict[str, str]) -> None:
        raise AssertionError("a fake engine is never started")

    def alive(self) -> bool:
        return self.exit_code is None

    def touch_leash(self) -> None:
        pass

    def ask_to_stop(self, how: str) -> None:
        self.requests.append(how)

    def signal(self, number: signal.Signals) -> None:
        self.requests.append(number)


if TYPE_CHECKING:
    checked: Engine = FakeEngine()
