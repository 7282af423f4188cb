"""Huey's queue in an SQLite file, without its polling: an idle worker sleeps.

Huey's own threads ask the file for a message each, several times a second. Here only one thread
waits at a time: whoever enqueues a message writes a byte into a FIFO beside the file. A byte that
is lost costs a few seconds, since the file is asked from time to time anyway.
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
# What a queue that does not work raises, in SQLite or Redis. The rows are the truth, so whoever
# enqueues a message goes on without it.
QUEUE_ERRORS = (OSError, sqlite3.Error, RedisError)


class BlockingSqliteStorage(SqliteStorage):  # type: ignore[misc]
    """Storage whose `dequeue` sleeps until a message comes."""

    blocking = True  # Huey: `dequeue` waits by itself

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
        """The next message; None after a while without one."""
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
        """The consumer ends: nobody waits any more."""
        self.is_closing = True
        self._wake_reader()

    def _wait_for_message(self, seconds: float) -> None:
        if self._reader is None:
            try:
                os.mkfifo(self.fifo, mode=0o600)
            except FileExistsError:
                pass
            # Opened for writing, too, so that it never ends when a writer leaves.
            self._reader = os.open(self.fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            seconds = 0.0  # a message may have come before anybody could hear of it
        if select.select([self._reader], [], [], seconds)[0]:
            try:
                os.read(self._reader, 1)
            except BlockingIOError:
                pass  # another process was faster

    def _wake_reader(self) -> None:
        try:
            writer = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # nobody waits; a worker that starts asks the file first
        try:
            os.write(writer, b"x")
        except (BlockingIOError, BrokenPipeError):
            pass  # it holds enough of them, or its reader has just gone
        finally:
            os.close(writer)
