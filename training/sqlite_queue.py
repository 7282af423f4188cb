"""Huey's SQLite queue without polling, so that an idle worker sleeps.

Huey's own threads each query the file several times a second. Here only one thread waits at a time:
a process that enqueues a message writes one byte to a FIFO next to the file. A lost byte costs a
few seconds at most, because the file is also queried from time to time.
"""

from __future__ import annotations

import os
import select
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from huey.storage import SqliteStorage
from redis.exceptions import RedisError

MAX_WAIT_SECONDS = 5.0
# Errors of a broken queue, in SQLite or Redis. The database rows are authoritative, so a caller
# that cannot enqueue a message continues without it.
QUEUE_ERRORS = (OSError, sqlite3.Error, RedisError)


class BlockingSqliteStorage(SqliteStorage):  # type: ignore[misc]
    """Storage whose `dequeue` blocks until a message arrives."""

    blocking = True  # tells Huey that `dequeue` waits

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fifo = Path(f"{self.filename}.fifo")
        self.is_closing = False
        self._reader: int | None = None
        self._dequeue_lock = threading.Lock()

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        super().enqueue(data, priority)
        self._wake_reader()

    def dequeue(self) -> bytes | None:
        """The next message; None if none arrives within MAX_WAIT_SECONDS."""
        with self._dequeue_lock:
            end = time.monotonic() + MAX_WAIT_SECONDS
            while not self.is_closing:
                message: bytes | None = super().dequeue()
                remaining = end - time.monotonic()
                if message is not None or remaining <= 0:
                    return message
                self._wait_for_message(remaining)
        return None

    def stop_waiting(self) -> None:
        """Wake the waiting thread when the consumer shuts down."""
        self.is_closing = True
        self._wake_reader()

    def _wait_for_message(self, seconds: float) -> None:
        if self._reader is None:
            try:
                os.mkfifo(self.fifo, mode=0o600)
            except FileExistsError:
                pass
            # Also open for writing, so that there is no end of file when a writer closes it.
            self._reader = os.open(self.fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            seconds = 0.0  # a message may have been enqueued before the FIFO existed
        if select.select([self._reader], [], [], seconds)[0]:
            try:
                os.read(self._reader, 1)
            except BlockingIOError:
                pass  # another process has read it

    def _wake_reader(self) -> None:
        try:
            writer = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # nobody is waiting; a starting worker queries the file first
        try:
            os.write(writer, b"x")
        except (BlockingIOError, BrokenPipeError):
            pass  # the FIFO is full, or its reader has just exited
        finally:
            os.close(writer)
