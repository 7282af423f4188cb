"""Limits how many child programs run on a host at the same time, over the web server, the worker
and every command. A slot is a lock on a file, which the kernel releases however its holder ends.

Engines and the inference server are not counted: devices and quotas limit them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.05, 0.5


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
    in the browser.
    """

    folder: Path  # of this host
    count: int

    @contextmanager
    def hold_interactive_slot(self, user: str, *, seconds: float) -> Iterator[None]:
        """Wait up to `seconds` for a slot, and hold it. A user has at most `count`, so that a flood
        of one user's requests leaves a slot to others.

        Raises:
            SlotsBusy: no slot became free.
        """
        deadline = time.monotonic() + seconds
        digest = hashlib.sha256(user.encode()).hexdigest()[:16]
        own_slots = [self.get_path(f"user-{digest}-{number}") for number in range(self.count)]
        slots = [self.get_path("interactive"), *self.shared_paths]
        with (
            self._hold_one(own_slots, deadline=deadline),
            self._hold_one(slots, deadline=deadline),
        ):
            yield

    @contextmanager
    def hold_background_slot(
        self, *, on_wait: Callable[[], None], cancelled: threading.Event | None = None
    ) -> Iterator[None]:
        """Wait for a slot as long as it takes, and hold it. `on_wait` is called once if there is
        none. If `cancelled` is set meanwhile, continue without one: the program is terminated at
        once.
        """
        with self._hold_one(self.shared_paths, on_wait=on_wait, cancelled=cancelled):
            yield

    @property
    def shared_paths(self) -> list[Path]:
        return [self.get_path(str(number)) for number in range(1, self.count + 1)]

    def get_path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    @contextmanager
    def _hold_one(
        self,
        paths: Sequence[Path],
        *,
        deadline: float | None = None,
        on_wait: Callable[[], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        poll_seconds = MIN_POLL_SECONDS
        while (descriptor := lock_first_free_file(paths)) is None:
            if on_wait is not None:
                on_wait()
                on_wait = None
            if cancelled is not None and cancelled.is_set():
                break
            if deadline is not None and time.monotonic() > deadline:
                raise SlotsBusy
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, MAX_POLL_SECONDS)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)


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
