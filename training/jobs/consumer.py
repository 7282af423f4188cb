"""Huey's consumers, whose threads run jobs in the worker process."""

from __future__ import annotations

from typing import Any

from huey.consumer import Consumer

from training.jobs.kinds import LANES
from training.sqlite_queue import BlockingSqliteStorage

SCHEDULER_SECONDS = 60  # no task is ever scheduled
STOP_CHECK_SECONDS = 1.0  # how often to check for a stop signal; Huey's default is every 0.1 s


class QueueConsumer(Consumer):  # type: ignore[misc]
    """A Huey consumer that stops at once, although its threads wait for messages without polling.

    The worker program creates and starts it. It ends with `stop`.
    """

    def __init__(self, huey: Any, threads: int) -> None:
        super().__init__(
            huey,
            workers=threads,
            periodic=False,
            initial_delay=0.05,
            max_delay=0.5,
            scheduler_interval=SCHEDULER_SECONDS,
        )
        self._stop_flag_timeout = STOP_CHECK_SECONDS

    def stop(self, graceful: bool = False) -> None:
        if isinstance(self.huey.storage, BlockingSqliteStorage):
            self.huey.storage.stop_waiting()
        super().stop(graceful)


class JobConsumer(QueueConsumer):
    """A consumer with one thread per slot of every lane, so that no lane waits for another."""

    def __init__(self, huey: Any) -> None:
        super().__init__(huey, threads=sum(lane.size for lane in LANES.values()))

    def _set_signal_handlers(self) -> None:
        """Not here: the worker's main thread handles signals (training/runs/worker/main.py)."""
