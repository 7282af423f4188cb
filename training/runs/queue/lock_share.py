"""Lets a repeated transaction hold SQLite's only write lock at most half of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MAX_PAUSE_SECONDS = 5.0


class LockShare:
    """After each transaction the next one waits as long as it took. SQLite gives the lock to
    whoever asks at the right moment, so without a pause a launch waits behind all of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    @contextmanager
    def hold(self) -> Iterator[None]:
        with self._lock:
            time.sleep(max(0.0, self._free_at - time.monotonic()))
            started_at = time.monotonic()
            try:
                yield
            finally:
                now = time.monotonic()
                self._free_at = now + min(now - started_at, MAX_PAUSE_SECONDS)


queue_share = LockShare()
