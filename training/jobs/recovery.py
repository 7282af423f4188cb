"""Recover jobs whose worker has died, and jobs whose queue message was lost."""

from __future__ import annotations

from datetime import timedelta

from django.db.models import F
from django.utils import timezone

from training.jobs.kinds import KINDS, LANES
from training.jobs.models import OPEN_STATES, Job, JobState
from training.jobs.queue import wake_worker
from training.jobs.runner import fail_job, waiting_jobs
from training.process_identity import get_host_name, get_process_name, is_alive

RECOVERY_SECONDS = 1.0
MAX_TRIES_MESSAGE = "The worker stopped responding {tries} times during this job. See its log."


def recover_and_wake_jobs() -> None:
    """Called by the worker every RECOVERY_SECONDS. With no open jobs it costs one query."""
    if not Job.objects.filter(state__in=OPEN_STATES).exists():
        return
    recover_lost_jobs()
    for lane in LANES.values():
        for job_id in waiting_jobs(lane).values_list("pk", flat=True)[: lane.free_slots]:
            wake_worker(job_id)


def recover_lost_jobs() -> None:
    """Requeue the jobs whose worker has died, or fail them after the kind's `max_tries`."""
    for job in Job.objects.filter(state=JobState.RUNNING, kind__in=KINDS):
        if not is_lost(job):
            continue
        limit = KINDS[job.kind].max_tries
        if limit is not None and job.tries >= limit:
            fail_job(job, MAX_TRIES_MESSAGE.format(tries=job.tries))
        else:
            release_job(job)


def is_lost(job: Job) -> bool:
    """Whether the job has sent no heartbeat for too long, or its worker on this host has exited."""
    timeout = timedelta(seconds=KINDS[job.kind].heartbeat_timeout_seconds)
    if job.heartbeat_at is None or job.heartbeat_at < timezone.now() - timeout:
        return True
    is_ours = job.worker.startswith(f"{get_host_name()}:")
    return is_ours and job.worker != get_process_name() and not is_alive(job.worker)


def release_job(job: Job) -> None:
    """Requeue a job. The UPDATE is conditional, because the job may send a heartbeat just now."""
    Job.objects.filter(
        pk=job.pk,
        state=JobState.RUNNING,
        claim_token=job.claim_token,
        heartbeat_at=job.heartbeat_at,
    ).update(state=JobState.WAITING, claim_token="", progress_message="")


def release_own_jobs() -> None:
    """Called when this worker shuts down: another worker can take its jobs at once, and the try
    does not count.
    """
    Job.objects.filter(state=JobState.RUNNING, worker=get_process_name()).update(
        state=JobState.WAITING, claim_token="", progress_message="", tries=F("tries") - 1
    )
