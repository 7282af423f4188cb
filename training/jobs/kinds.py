"""The registry of job kinds. Each app registers its own in `AppConfig.ready`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.db import models
from django.db.models.signals import post_delete

from training.jobs.models import Job, JobSubject

HEARTBEAT_TIMEOUT_SECONDS = 29.0  # plus RECOVERY_SECONDS: half a minute
MAX_TRIES = 3
DEFAULT_CRASH_MESSAGE = "Unexpected error ({error}). See the worker's log."


class Lane:
    """A group of job kinds of which a worker runs at most `size` jobs at a time.

    Lanes do not wait for each other, since a worker has a thread for every slot of every lane.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.running_count = 0
        self._lock = threading.Lock()

    def acquire_slot(self) -> bool:
        """Take a slot. Returns False if none is free."""
        with self._lock:
            if self.running_count >= self.size:
                return False
            self.running_count += 1
            return True

    def release_slot(self) -> None:
        with self._lock:
            self.running_count -= 1

    @property
    def free_slots(self) -> int:
        return self.size - self.running_count

    @property
    def kind_names(self) -> list[str]:
        return [kind.name for kind in KINDS.values() if kind.lane is self]


@dataclass(frozen=True)
class JobKind:
    """What a kind of job does, and its limits.

    `run` does the work and returns the result; it must be idempotent. `on_done` gets the result, or
    `on_failed` the error message, in the transaction that ends the job. If a job has no heartbeat
    for `heartbeat_timeout_seconds`, it is started again, up to `max_tries` times.
    """

    name: str
    run: Callable[[Job], dict[str, Any]]
    lane: Lane
    subjects: tuple[type[models.Model], ...]  # models whose deletion cancels the job
    heartbeat_timeout_seconds: float = HEARTBEAT_TIMEOUT_SECONDS
    max_tries: int | None = MAX_TRIES
    one_per_owner: bool = False
    # A context that wraps `run` and the storing of its result
    guard: Callable[[Job], AbstractContextManager[None]] = lambda _job: nullcontext()
    on_done: Callable[[Job, dict[str, Any]], None] | None = None
    on_failed: Callable[[Job, str], None] | None = None
    # Folders that a job writes besides its own
    output_folders: Callable[[Job], list[Path]] = lambda _job: []
    crash_message: str = DEFAULT_CRASH_MESSAGE  # {error} is the name of the exception


KINDS: dict[str, JobKind] = {}
LANES: dict[str, Lane] = {}


def register_kind(kind: JobKind) -> None:
    KINDS[kind.name] = kind
    LANES[kind.lane.name] = kind.lane
    for model in kind.subjects:
        post_delete.connect(
            delete_subject_jobs, sender=model, dispatch_uid=f"jobs of {model._meta.label_lower}"
        )


def delete_subject_jobs(instance: models.Model, **_signal: Any) -> None:
    """Delete the jobs about a deleted row. A worker that runs one of them stops."""
    subjects = JobSubject.objects.filter(model=instance._meta.label_lower, object_id=instance.pk)
    Job.objects.filter(pk__in=list(subjects.values_list("job", flat=True))).delete()
