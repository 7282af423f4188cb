"""Limits the time and memory of rendering a chat template, which is code that came with the model.

A thread watches the renders that take long and raises an exception in their thread. It stops loops
in the template. It cannot interrupt one operation of C code, such as a large power: that holds up
the process, which its parent then ends (snapml_site/processes.py, runs/worker/supervisor.py).
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
import weakref
from pathlib import Path

MAX_SECONDS = 5.0  # for one render, which takes about 1 ms
MAX_PROMPT_SECONDS = 10.0  # for a prompt of the inference server, which waits for it
MAX_ROW_SECONDS = 60.0  # for a training row; each answer is rendered several times
MAX_GROWTH_BYTES = 2**30  # of the process's address space while the template is rendered
WATCH_SECONDS = 0.2
STATM = Path("/proc/self/statm")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class RenderLimitExceeded(Exception):
    """Raised inside of the template."""


class RenderLimit:
    """A limit for the code inside `with`. Inside of another limit, both are in force.

    The exception may arrive at any instruction of the thread, also between two lines of this class.
    The watchdog therefore holds only a weak reference: a limit ends with its `with` statement,
    whatever happened to `__exit__`.
    """

    def __init__(self, seconds: float, *, limits_memory: bool) -> None:
        self.seconds = seconds
        self.limits_memory = limits_memory
        self.deadline = 0.0

    def __enter__(self) -> None:
        watchdog.add_limit(self)

    def __exit__(self, *_exception: object) -> None:
        while True:
            try:
                was_stopped = watchdog.remove_limit(self)
                break
            except RenderLimitExceeded:  # of the outer limit
                continue
        if was_stopped:
            raise RenderLimitExceeded


class RenderWatchdog:
    """Raises RenderLimitExceeded in the threads whose limits are exceeded. The limits of a thread
    are listed with the outermost first. While one of them limits memory, what the whole process
    allocates is limited: more is a MemoryError, also of a single operation.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.limits: dict[int, list[weakref.ref[RenderLimit]]] = {}
        self.stopped: set[int] = set()
        self.has_limits = threading.Event()
        self.is_memory_limited = False
        self.outer_memory_limit = resource.RLIM_INFINITY  # that of the parent
        self.thread: threading.Thread | None = None

    def add_limit(self, limit: RenderLimit) -> None:
        thread_id = threading.get_ident()
        limit.deadline = time.monotonic() + limit.seconds
        max_bytes = read_address_space_bytes() + MAX_GROWTH_BYTES if limit.limits_memory else 0
        with self.lock:
            limits = self._find_limits(thread_id)
            is_outermost = not limits
            self.limits[thread_id] = [weakref.ref(one) for one in (*limits, limit)]
            if self.thread is None or not self.thread.is_alive():  # threads do not survive a fork
                self.thread = threading.Thread(
                    target=self.watch_limits, name="render-limit", daemon=True
                )
                self.thread.start()
            if limit.limits_memory and not self.is_memory_limited:
                self._limit_memory(max_bytes)
        # Not for inner limits: an exception inside of `Event.set` would leave its lock locked
        if is_outermost:
            self.has_limits.set()

    def remove_limit(self, limit: RenderLimit) -> bool:
        """Whether the code inside was stopped. The exception may not have been raised yet; then it
        is withdrawn.
        """
        thread_id = threading.get_ident()
        with self.lock:
            outer = [one for one in self._find_limits(thread_id) if one is not limit]
            self.limits[thread_id] = [weakref.ref(one) for one in outer]
            if not outer:
                del self.limits[thread_id]
            self._lift_memory_limit()
            was_stopped = thread_id in self.stopped
            self.stopped.discard(thread_id)
            if was_stopped:
                raise_in_thread(thread_id, None)
        return was_stopped

    def watch_limits(self) -> None:
        while True:
            self.has_limits.wait()
            time.sleep(WATCH_SECONDS)
            with self.lock:
                for thread_id in list(self.limits):
                    if not self._find_limits(thread_id):
                        del self.limits[thread_id]
                self._lift_memory_limit()
                if not self.limits:
                    self.has_limits.clear()
                    continue
                now = time.monotonic()
                for thread_id in self.limits:
                    deadline = min(
                        (limit.deadline for limit in self._find_limits(thread_id)), default=now
                    )
                    if now > deadline:
                        # Again and again: the template's environment swallows some exceptions
                        self.stopped.add(thread_id)
                        raise_in_thread(thread_id, RenderLimitExceeded)

    def _limit_memory(self, max_bytes: int) -> None:
        # In this order, the limit is lifted even if an exception arrives in between
        self.outer_memory_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        self.is_memory_limited = True
        if self.outer_memory_limit != resource.RLIM_INFINITY:
            max_bytes = min(max_bytes, self.outer_memory_limit)
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, hard_limit))

    def _lift_memory_limit(self) -> None:
        """Lift the limit unless a `with` statement still needs it."""
        is_needed = any(
            limit.limits_memory
            for thread_id in self.limits
            for limit in self._find_limits(thread_id)
        )
        if self.is_memory_limited and not is_needed:
            _limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (self.outer_memory_limit, hard_limit))
            self.is_memory_limited = False

    def _find_limits(self, thread_id: int) -> list[RenderLimit]:
        """The limits of a thread whose `with` statements have not ended."""
        found = [ref() for ref in self.limits.get(thread_id, [])]
        return [limit for limit in found if limit is not None]


def raise_in_thread(thread_id: int, error: type[Exception] | None) -> None:
    """Raise an exception in another thread at its next Python instruction; None withdraws it."""
    argument = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), argument)


def read_address_space_bytes() -> int:
    return int(STATM.read_text().split()[0]) * PAGE_BYTES


watchdog = RenderWatchdog()


def limit_render() -> RenderLimit:
    """Limit the code inside `with`, which renders a template, to MAX_SECONDS and MAX_GROWTH_BYTES.

    Raises:
        RenderLimitExceeded: it needed more time.
        MemoryError: it needed more memory.
    """
    return RenderLimit(MAX_SECONDS, limits_memory=True)


def limit_time(seconds: float) -> RenderLimit:
    """Limit the code inside `with`, which renders several templates.

    Raises:
        RenderLimitExceeded: it needed more time.
    """
    return RenderLimit(seconds, limits_memory=False)
