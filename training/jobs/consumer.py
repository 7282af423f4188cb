"""The threads that run jobs, in the worker's process."""

from __future__ import annotations

from typing import Any

from huey.consumer import Consumer

from training.jobs.kinds import LANES
from training.sqlite_queue import BlockingSqliteStorage

SCHEDULER_SECONDS = 60  # nothing is ever scheduled
STOP_CHECK_SECONDS = 1.0  # between two looks for a signal; Huey looks ten times a second


class QueueConsumer(Consumer):  # type: ignore[misc]
    """Huey's consumer; those of its threads that wait for a message wait no more once it ends."""

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
    """A thread for each place in each lane, so that no lane waits for another."""

    def __init__(self, huey: Any) -> None:
        super().__init__(huey, threads=sum(lane.size for lane in LANES.values()))

    def _set_signal_handlers(self) -> None:
        """The worker's main thread has them (training/runs/worker/main.py)."""
