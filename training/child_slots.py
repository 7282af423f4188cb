"""Limits how many child programs run on a host at the same time and how much memory they may take
together, over the web server, the worker and every command. A slot is a lock on a file, which the
kernel releases however its holder ends.

Engines and the inference server are not counted: devices and quotas limit them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError

POLL_SECONDS = 0.05
MIN_INTERACTIVE_BYTES = 2 * 2**30  # for the largest interactive program
MAX_WAITING_PER_USER = 8  # in this process; each is a thread with a database connection
# For this time, the last user of the interactive slot leaves it to others.
FAIRNESS_DELAY_SECONDS = 0.25

waiting_per_user: Counter[str] = Counter()
waiting_lock = threading.Lock()


class SlotsBusy(UserError):
    """No slot became free in time."""

    status = 429

    def __init__(self) -> None:
        super().__init__(
            "Other files and previews are being processed. Try again in a minute.",
            code="slots_busy",
        )


@dataclass(frozen=True)
class ChildSlots:
    """`count` slots for all programs, and one more for interactive ones, which somebody waits for
    in the browser. Of `memory_bytes`, a quarter and at least MIN_INTERACTIVE_BYTES are for
    interactive programs and the rest for background ones, so that neither kind waits for the other
    one's memory. A program that needs more than that starts when no other of its kind runs.
    """

    folder: Path  # of this host
    count: int
    memory_bytes: int

    @contextmanager
    def hold_interactive_slot(
        self, username: str, memory_bytes: int, *, seconds: float
    ) -> Iterator[None]:
        """Wait up to `seconds` for a slot, and hold it. A user has at most `count`, and users take
        turns at the last one, so that a flood of one user's requests does not block others.

        Raises:
            SlotsBusy: no slot became free, or MAX_WAITING_PER_USER requests of this user wait.
        """
        deadline = time.monotonic() + seconds
        user = hashlib.sha256(username.encode()).hexdigest()[:16]

        def check_deadline() -> None:
            if time.monotonic() > deadline:
                raise SlotsBusy

        own_slots = [self.get_path(f"user-{user}-{number}") for number in range(self.count)]
        with (
            count_waiting(user) as stop_counting,
            wait_for_lock(lambda: lock_first_free_file(own_slots), check_deadline),
            self._hold_slot(memory_bytes, check_deadline, user),
        ):
            stop_counting()
            yield

    @contextmanager
    def hold_background_slot(
        self, memory_bytes: int, *, on_wait: Callable[[], None]
    ) -> Iterator[None]:
        """Wait for a slot as long as it takes, and hold it. `on_wait` is called again and again
        while there is none; it may raise.
        """
        with self._hold_slot(memory_bytes, on_wait):
            yield

    @contextmanager
    def _hold_slot(
        self, memory_bytes: int, on_wait: Callable[[], None], user: str = ""
    ) -> Iterator[None]:
        """A slot of all programs, or for a `user` also the interactive one."""
        started_at = time.monotonic()

        def lock_slot() -> int | None:
            may_reuse = time.monotonic() - started_at > FAIRNESS_DELAY_SECONDS
            return self._lock_slot(memory_bytes, user, may_reuse=may_reuse)

        with wait_for_lock(lock_slot, on_wait):
            yield

    def _lock_slot(self, memory_bytes: int, user: str, *, may_reuse: bool) -> int | None:
        """Lock a free slot and write its memory and user into it. Returns its descriptor, or None
        if there is none or too little memory is left for programs of this kind.
        """
        interactive_bytes = self.interactive_bytes
        max_bytes = interactive_bytes if user else self.memory_bytes - interactive_bytes
        with closing_descriptor(lock_file(self.get_path("admission"))):
            held_bytes, chosen = 0, None
            with ExitStack() as free_slots:
                for path in (*self.shared_paths, self.interactive_path):
                    descriptor = lock_first_free_file([path])
                    if descriptor is None:
                        slot_bytes, slot_user = read_slot(path)
                        held_bytes += slot_bytes if bool(slot_user) == bool(user) else 0
                        continue
                    free_slots.callback(os.close, descriptor)
                    if chosen is None and self._may_use_slot(path, user, may_reuse=may_reuse):
                        chosen = descriptor
                if chosen is None or (held_bytes and held_bytes + memory_bytes > max_bytes):
                    return None
                os.ftruncate(chosen, 0)
                os.pwrite(chosen, f"{memory_bytes} {user}".encode(), 0)
                # The copy keeps the lock when the stack closes its own
                return os.dup(chosen)

    def _may_use_slot(self, path: Path, user: str, *, may_reuse: bool) -> bool:
        if path != self.interactive_path:
            return True
        return bool(user) and (may_reuse or read_slot(path)[1] != user)

    @property
    def interactive_bytes(self) -> int:
        """The memory for interactive programs; at most half of all."""
        return min(self.memory_bytes // 2, max(self.memory_bytes // 4, MIN_INTERACTIVE_BYTES))

    @property
    def interactive_path(self) -> Path:
        return self.get_path("interactive")

    @property
    def shared_paths(self) -> list[Path]:
        return [self.get_path(str(number)) for number in range(1, self.count + 1)]

    def get_path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.lock"


@contextmanager
def count_waiting(user: str) -> Iterator[Callable[[], None]]:
    """Count a waiting request of a user until the function that it gives is called.

    Raises:
        SlotsBusy: MAX_WAITING_PER_USER wait already.
    """
    is_counted = True

    def stop_counting() -> None:
        nonlocal is_counted
        if is_counted:
            is_counted = False
            with waiting_lock:
                waiting_per_user[user] -= 1

    with waiting_lock:
        if waiting_per_user[user] >= MAX_WAITING_PER_USER:
            raise SlotsBusy
        waiting_per_user[user] += 1
    try:
        yield stop_counting
    finally:
        stop_counting()


@contextmanager
def wait_for_lock(lock: Callable[[], int | None], on_wait: Callable[[], None]) -> Iterator[None]:
    """Call `lock` until it returns the descriptor of a locked file, and hold that."""
    while (descriptor := lock()) is None:
        on_wait()
        time.sleep(POLL_SECONDS)
    with closing_descriptor(descriptor):
        yield


@contextmanager
def closing_descriptor(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def lock_file(path: Path) -> int:
    """Wait until the file can be locked, and return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def lock_first_free_file(paths: Sequence[Path]) -> int | None:
    """Lock the first file that nobody has locked. Its descriptor, or None if all are locked."""
    for path in paths:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor
    return None


def read_slot(path: Path) -> tuple[int, str]:
    """The memory in bytes and the user that the last holder of a slot has written into it."""
    memory_bytes, _, user = path.read_text().partition(" ")
    return int(memory_bytes or 0), user
