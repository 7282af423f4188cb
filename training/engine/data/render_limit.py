"""Limits the time and memory of rendering a chat template, which is code of whoever made the model.

A thread watches the renders that take long and raises an exception in their thread. It stops loops
in the template; one operation of C code, such as a large multiplication, it cannot interrupt.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_SECONDS = 5.0  # a row takes about 1 ms
MAX_GROWTH_BYTES = 2**30  # of the process while the template is rendered
WATCH_SECONDS = 0.2
STATM = Path("/proc/self/statm")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class RenderLimitExceeded(Exception):
    """Raised inside of the template."""


class Watch:
    """The renders that run now, by thread, with their deadline and the process's memory at their
    start, as the watching thread first saw it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.start_bytes: dict[int, int] = {}
        self.stopped: set[int] = set()
        self.has_renders = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        thread_id = threading.get_ident()
        with self.lock:
            self.deadlines[thread_id] = time.monotonic() + MAX_SECONDS
            self.stopped.discard(thread_id)
            if self.thread is None or not self.thread.is_alive():  # not after a fork
                self.thread = threading.Thread(target=self.run, name="render-limit", daemon=True)
                self.thread.start()
        self.has_renders.set()

    def end(self) -> bool:
        """Whether the render was stopped. Its exception may not have been raised yet; then it is
        withdrawn.
        """
        thread_id = threading.get_ident()
        with self.lock:
            del self.deadlines[thread_id]
            self.start_bytes.pop(thread_id, None)
            was_stopped = thread_id in self.stopped
            self.stopped.discard(thread_id)
            if was_stopped:
                raise_in_thread(thread_id, None)
        return was_stopped

    def run(self) -> None:
        while True:
            self.has_renders.wait()
            time.sleep(WATCH_SECONDS)
            with self.lock:
                if not self.deadlines:
                    self.has_renders.clear()
                    continue
                now, used_bytes = time.monotonic(), read_memory_bytes()
                for thread_id, deadline in self.deadlines.items():
                    start_bytes = self.start_bytes.setdefault(thread_id, used_bytes)
                    is_over = now > deadline or used_bytes - start_bytes > MAX_GROWTH_BYTES
                    if is_over and thread_id not in self.stopped:
                        self.stopped.add(thread_id)
                        raise_in_thread(thread_id, RenderLimitExceeded)


def raise_in_thread(thread_id: int, error: type[Exception] | None) -> None:
    """Raise an exception in another thread at its next Python instruction; None withdraws it."""
    argument = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), argument)


def read_memory_bytes() -> int:
    """The resident memory of this process."""
    return int(STATM.read_text().split()[1]) * PAGE_BYTES


watch = Watch()


@contextmanager
def limit_render() -> Iterator[None]:
    """Limit the code inside to MAX_SECONDS and MAX_GROWTH_BYTES.

    Raises:
        RenderLimitExceeded: it needed more.
    """
    watch.begin()
    try:
        yield
    finally:
        was_stopped = watch.end()
        if was_stopped:
            raise RenderLimitExceeded
