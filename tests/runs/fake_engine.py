"""An engine without a process, for tests of the supervisor. mypy checks it against the protocol."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.runs.worker.engine_process import Engine


class FakeEngine:
    """It has exited with `exit_code`; without one, it is alive and ignores all requests."""

    def __init__(self, exit_code: int | None = None, *, was_oom_killed: bool = False) -> None:
        self.exit_code = exit_code
        self.was_oom_killed = was_oom_killed
        self.pid: int | None = None
        self.requests: list[str | signal.Signals] = []

    def start_process(self, device_environment: dict[str, str]) -> None:
        raise AssertionError("a fake engine is never started")

    def is_alive(self) -> bool:
        return self.exit_code is None

    def touch_heartbeat(self) -> None:
        pass

    def request_stop(self, mode: str) -> None:
        self.requests.append(mode)

    def send_signal(self, number: signal.Signals) -> None:
        self.requests.append(number)


if TYPE_CHECKING:
    checked: Engine = FakeEngine()
