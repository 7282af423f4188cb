"""Limits the time and memory of rendering a chat template, which is code that came with the model.

A thread watches the renders that take long and raises an exception in their thread. It stops loops
in the template. It cannot interrupt one operation of C code, such as a large multiplication.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_SECONDS = 5.0  # for one render, which takes about 1 ms
MAX_PROMPT_SECONDS = 10.0  # for a prompt of the inference server, which waits for it
MAX_ROW_SECONDS = 60.0  # for a training row; each answer is rendered several times
MAX_GROWTH_BYTES = 2**30  # of the process while the template is rendered
WATCH_SECONDS = 0.2
STATM = Path("/proc/self/statm")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class RenderLimitExceeded(Exception):
    """Raised inside of the template."""


class Watch:
    """The limits that are in force, by thread: their deadlines, the outermost first, and the
    process's memory as the watching thread first saw it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, list[float]] = {}
        self.start_bytes: dict[int, int] = {}
        self.stopped: set[int] = set()
        self.has_limits = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self.lock:
            deadlines = self.deadlines.setdefault(threading.get_ident(), [])
            deadlines.append(min([deadline, *deadlines[-1:]]))
            if self.thread is None or not self.thread.is_alive():  # not after a fork
                self.thread = threading.Thread(target=self.run, name="render-limit", daemon=True)
                self.thread.start()
        self.has_limits.set()

    def end(self) -> bool:
        """Whether the code inside was stopped. The exception may not have been raised yet; then it
        is withdrawn.
        """
        thread_id = threading.get_ident()
        with self.lock:
            deadlines = self.deadlines.get(thread_id, [])
            deadlines[-1:] = []
            if not deadlines:
                self.deadlines.pop(thread_id, None)
                self.start_bytes.pop(thread_id, None)
            was_stopped = thread_id in self.stopped
            self.stopped.discard(thread_id)
            if was_stopped:
                raise_in_thread(thread_id, None)
        return was_stopped

    def run(self) -> None:
        while True:
            self.has_limits.wait()
            time.sleep(WATCH_SECONDS)
            with self.lock:
                if not self.deadlines:
                    self.has_limits.clear()
                    continue
                now, used_bytes = time.monotonic(), read_memory_bytes()
                for thread_id, deadlines in self.deadlines.items():
                    start_bytes = self.start_bytes.setdefault(thread_id, used_bytes)
                    if now > deadlines[-1] or used_bytes - start_bytes > MAX_GROWTH_BYTES:
                        # Again and again: the template's environment swallows some exceptions
                        self.stopped.add(thread_id)
                        raise_in_thread(thread_id, RenderLimitExceeded)


def raise_in_thread(thread_id: int, error: type[Exception] | None) -> None:
    """Raise an exception in another thread at its next Python instruction; None withdraws it."""
    argument = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), argument)


def read_memory_bytes() -> int:
    """The resident memory of this process; 0 if the system does not say."""
    try:
        text = STATM.read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * PAGE_BYTES


watch = Watch()


@contextmanager
def limit_render(seconds: float | None = None) -> Iterator[None]:
    """Limit the code inside to this time (MAX_SECONDS) and MAX_GROWTH_BYTES. Inside of another
    limit, both are in force.

    Raises:
        RenderLimitExceeded: it needed more.
    """
    watch.begin(MAX_SECONDS if seconds is None else seconds)
    try:
        yield
    finally:
        if watch.end():
            raise RenderLimitExceeded
