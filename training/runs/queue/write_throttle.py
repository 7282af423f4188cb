"""Lets a repeated transaction hold SQLite's only write lock at most half of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection, transaction

MAX_PAUSE_SECONDS = 5.0


class WriteThrottle:
    """Before each transaction, waits as long as the last one held the lock. SQLite's
    waiters poll for it, so without a pause a launch waits behind all of the transactions. Other
    databases have no such lock.
    """

    def __init__(self) -> None:
        self._free_at = 0.0

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """A transaction that starts only after a pause as long as the last one held the lock."""
        if connection.vendor == "sqlite":
            time.sleep(max(0.0, self._free_at - time.monotonic()))
        with transaction.atomic():
            started_at = time.monotonic()  # after SQLite has given the lock
            try:
                yield
            finally:
                now = time.monotonic()
                self._free_at = now + min(now - started_at, MAX_PAUSE_SECONDS)
