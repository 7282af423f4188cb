"""Huey's queue in an SQLite file, without its polling: an idle worker sleeps.

Huey's own threads ask the file for a message each, several times a second. Here one thread of all
waits for the next message. It learns of those from its own process at once, and of those from
others by `PRAGMA data_version`, which costs microseconds.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from huey.storage import SqliteStorage

POLL_SECONDS = 0.05
MAX_WAIT_SECONDS = 5.0  # then Huey looks at its stop flag


class WaitingSqliteStorage(SqliteStorage):  # type: ignore[misc]
    blocking = True  # Huey: `dequeue` waits by itself

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.closing = threading.Event()  # the consumer ends: nobody is to wait any more
        self._first_in_line = threading.Lock()
        self._enqueued = threading.Event()

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        super().enqueue(data, priority)
        self._enqueued.set()

    def dequeue(self) -> bytes | None:
        """The next message; None after a while without one."""
        with self._first_in_line:
            end = time.monotonic() + MAX_WAIT_SECONDS
            while not self.closing.is_set():
                self._enqueued.clear()
                version = self._data_version()
                message: bytes | None = super().dequeue()
                if message is not None or time.monotonic() >= end:
                    return message
                while self._data_version() == version and time.monotonic() < end:
                    if self._enqueued.wait(POLL_SECONDS) or self.closing.is_set():
                        break
        return None

    def _data_version(self) -> int:
        """Another number after each commit of another connection to the file."""
        rows: list[tuple[int]] = self.sql("pragma data_version", results=True)
        return rows[0][0]
