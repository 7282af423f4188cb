"""Claim jobs and run them.

A claim is one conditional UPDATE with a new random token, and every later write requires that
token. A worker whose UPDATE changes no row has lost the job and stops.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from django.conf import settings
from django.db import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    connection,
    models,
    transaction,
)
from django.db.models import F, Q
from django.utils import timezone

from training.child_process import (
    Message,
    ProgramLimits,
    child_environment,
    module_command,
    stream_child,
    write_params,
)
from training.child_slots import ChildSlots
from training.errors import UserError, find_storage_error
from training.jobs.kinds import KINDS, Lane
from training.jobs.models import Job, JobState
from training.process_identity import get_process_name
from training.text_input import clean_value

HEARTBEAT_SECONDS = 5.0
PROGRESS_COLUMNS = {
    "message": "progress_message",
    "done": "progress_done",
    "total": "progress_total",
}
log = logging.getLogger("snapml.jobs")
stopping = threading.Event()  # set when the worker program shuts down
cancelled: dict[int, threading.Event] = {}  # by id of the jobs that run in this process
Row = TypeVar("Row", bound=models.Model)


class JobCancelled(Exception):
    """The job was deleted, or another worker has claimed it."""


class RetryLater(Exception):
    """This try failed. The job is tried again after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def run_job(job_id: int) -> None:
    """Run the waiting jobs of this job's lane, if the lane has a free slot. A second call for the
    same job does nothing.
    """
    kind = Job.objects.filter(pk=job_id).values_list("kind", flat=True).first()
    if kind is not None:
        run_lane(KINDS[kind].lane)


def run_lane(lane: Lane) -> None:
    """Run the waiting jobs of a lane."""
    while lane.acquire_slot():
        try:
            while not stopping.is_set() and (job := claim_next(lane)) is not None:
                execute_job(job)
        finally:
            lane.release_slot()
        # A job that was enqueued before the slot was released found the lane full: check again.
        if stopping.is_set() or not waiting_jobs(lane).exists():
            return


def waiting_jobs(lane: Lane) -> models.QuerySet[Job]:
    """The jobs of a lane that may start now."""
    jobs = Job.objects.filter(
        kind__in=lane.kind_names, state=JobState.WAITING, run_after__lte=timezone.now()
    )
    exclusive = [name for name in lane.kind_names if KINDS[name].one_per_owner]
    if exclusive:
        busy = Job.objects.filter(kind__in=exclusive, state=JobState.RUNNING, owner__isnull=False)
        jobs = jobs.exclude(Q(kind__in=exclusive) & Q(owner__in=busy.values("owner")))
    return jobs


def claim_next(lane: Lane) -> Job | None:
    for job_id in order_by_fair_share(waiting_jobs(lane), lane)[: 4 * lane.size]:
        job = claim_job(job_id, lane)
        if job is not None:
            return job
    return None


def order_by_fair_share(jobs: models.QuerySet[Job], lane: Lane) -> list[int]:
    """The ids of waiting jobs in the order in which they start: first those of the owner with the
    fewest running jobs and the longest wait since the last one, so that no owner delays the others.
    """
    started = Job.objects.filter(kind__in=lane.kind_names).exclude(state=JobState.WAITING)
    by_owner = (
        started.order_by()
        .values_list("owner")
        .annotate(
            running=models.Count("pk", filter=Q(state=JobState.RUNNING)),
            last=models.Max("heartbeat_at"),
        )
    )
    shares = {
        owner: (running, last.timestamp() if last else 0.0) for owner, running, last in by_owner
    }
    waiting = jobs.order_by("run_after", "pk").values_list("pk", "owner")
    return [pk for pk, owner in sorted(waiting, key=lambda job: shares.get(job[1], (0, 0.0)))]


def claim_job(job_id: int, lane: Lane) -> Job | None:
    """Claim a job for this worker. Returns None if another worker was faster."""
    token = secrets.token_hex(16)
    is_claimed = (
        waiting_jobs(lane)
        .filter(pk=job_id)
        .update(
            state=JobState.RUNNING,
            claim_token=token,
            worker=get_process_name(),
            heartbeat_at=timezone.now(),
            tries=F("tries") + 1,
            progress_message="starting",
        )
    )
    if not is_claimed:
        return None
    return Job.objects.select_related("owner").filter(pk=job_id, claim_token=token).first()


def execute_job(job: Job) -> None:
    """Run a claimed job and store its outcome."""
    kind = KINDS[job.kind]
    try:
        with heartbeat(job), kind.guard(job):
            result = kind.run(job)
            complete_job(job, result)
    except JobCancelled:
        log.info("Job %s (%s) was cancelled, or another worker has claimed it.", job.pk, job)
        claimed_rows(job).delete()  # if it is still ours, a row that it is about is gone
    except RetryLater as retry:
        postpone_job(job, retry.seconds)
    except UserError as error:
        fail_job(job, error.message)
    except IntegrityError:
        if Job.objects.filter(pk=job.pk).exists():  # otherwise a row that it is about was deleted
            log.exception("Job %s (%s) failed.", job.pk, job)
            fail_job(job, kind.crash_message.format(error=IntegrityError.__name__))
    except Exception as error:
        log.exception("Job %s (%s) failed.", job.pk, job)
        storage_error = find_storage_error(error)
        message = kind.crash_message.format(error=type(error).__name__)
        fail_job(job, storage_error.message if storage_error else message)


def claimed_rows(job: Job) -> models.QuerySet[Job]:
    return Job.objects.filter(pk=job.pk, state=JobState.RUNNING, claim_token=job.claim_token)


def save_job(job: Job, **changes: Any) -> None:
    """Update the row of a job that this worker runs.

    Raises:
        JobCancelled: the job was deleted, or another worker has claimed it.
    """
    if not claimed_rows(job).update(heartbeat_at=timezone.now(), **changes):
        raise JobCancelled


def save_progress(job: Job, message: dict[str, Any]) -> None:
    """Store a program's progress message. Raises JobCancelled."""
    changes = {
        column: message[name] for name, column in PROGRESS_COLUMNS.items() if name in message
    }
    if "progress_message" in changes:
        changes["progress_message"] = clean_value(str(changes["progress_message"]))[:200]
    save_job(job, **changes)


def complete_job(job: Job, result: dict[str, Any]) -> None:
    """Store the result. Raises JobCancelled, and UserError from the kind's `on_done`."""
    kind, result = KINDS[job.kind], clean_value(result)
    with transaction.atomic():
        save_job(job, state=JobState.DONE, progress_message="", claim_token="")
        if kind.on_done is not None:
            kind.on_done(job, result)
        else:
            Job.objects.filter(pk=job.pk).update(result=result)


def fail_job(job: Job, error: str) -> None:
    kind, error = KINDS[job.kind], clean_value(error)
    with transaction.atomic():
        is_ours = claimed_rows(job).update(
            state=JobState.FAILED, error=error, progress_message="", claim_token=""
        )
        if is_ours and kind.on_failed is not None:
            kind.on_failed(job, error)


def postpone_job(job: Job, seconds: float) -> None:
    claimed_rows(job).update(
        state=JobState.WAITING,
        claim_token="",
        progress_message="",
        run_after=timezone.now() + timedelta(seconds=seconds),
    )


@contextmanager
def heartbeat(job: Job) -> Iterator[None]:
    """Update the job's heartbeat every HEARTBEAT_SECONDS from a thread of its own, which ends with
    the context.

    If the job is no longer ours, its event in `cancelled` is set, which also ends a program that
    sends no messages.
    """
    ended = threading.Event()
    cancelled[job.pk] = threading.Event()

    def send_heartbeats() -> None:
        try:
            while not ended.wait(HEARTBEAT_SECONDS):
                try:
                    if not claimed_rows(job).update(heartbeat_at=timezone.now()):
                        cancelled[job.pk].set()
                        return
                except (OperationalError, InterfaceError) as error:
                    # One missed heartbeat is harmless: the timeout is several intervals.
                    connection.close()
                    log.warning("The heartbeat of job %s could not be written (%s).", job.pk, error)
        finally:
            connection.close()

    thread = threading.Thread(target=send_heartbeats, name=f"heartbeat-{job.pk}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        del cancelled[job.pk]


def get_subject(job: Job, model: type[Row], *related: str) -> Row | None:
    """The row of this model that the job is about, or None.

    Raises:
        JobCancelled: the row was deleted.
    """
    rows = job.subjects.filter(model=model._meta.label_lower)
    object_id = rows.values_list("object_id", flat=True).first()
    if object_id is None:
        return None
    row: Row | None = (
        model._default_manager.select_related(*related).filter(pk=object_id).first()
        if related
        else model._default_manager.filter(pk=object_id).first()
    )
    if row is None:
        raise JobCancelled
    return row


def run_program(
    job: Job,
    module: str,
    params: dict[str, Any],
    *,
    limits: ProgramLimits,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run one of SnapML's programs in the job's folder and store its progress. Returns its result.

    Raises:
        UserError: the program reported an error.
        JobCancelled: the job was cancelled, and the program was terminated.
    """
    folder = folder or job.folder
    write_params(folder, params)
    result: dict[str, Any] = {}

    def save_message(message: Message) -> None:
        save_progress(job, message)
        result.update(message.get("result", {}))

    command = module_command(module, str(folder))
    log_file = folder / "program.log"
    follow_program(job, command, log_file, save_message, limits=limits, environment=environment)
    return result


def follow_program(
    job: Job,
    command: Sequence[str],
    log_file: Path,
    on_message: Callable[[Message], None],
    *,
    limits: ProgramLimits,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a program and call `on_message` with each of its messages. It is terminated when the job
    is cancelled or `on_message` raises.

    Raises:
        UserError: the program reported an error.
        JobCancelled: the job was cancelled while it waited for a slot.
    """
    is_cancelled = cancelled.get(job.pk)
    messages = stream_child(
        command,
        log_file,
        cwd=settings.BASE_DIR,
        environment=environment or child_environment(),
        limits=limits,
        cancelled=is_cancelled,
    )
    is_waiting = False

    def wait_for_slot() -> None:
        nonlocal is_waiting
        if is_cancelled is not None and is_cancelled.is_set():
            raise JobCancelled
        if not is_waiting:
            is_waiting = True
            on_message({"message": "waiting for other programs"})

    slots: ChildSlots = settings.CHILD_SLOTS
    with (
        slots.hold_background_slot(limits.counted_bytes, on_wait=wait_for_slot),
        closing(messages),
    ):
        if is_waiting:
            on_message({"message": "starting"})
        for message in messages:
            on_message(message)
