"""Enqueue jobs and find the jobs about a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from django.db import models, transaction
from django.utils import timezone

from training.errors import NotFound
from training.jobs.kinds import KINDS
from training.jobs.models import Job, JobState, JobSubject
from training.jobs.queue import wake_worker_on_commit
from training.people.models import User


def enqueue_job(
    user: User | None,
    kind: str,
    key: str,
    *,
    subjects: Iterable[models.Model] = (),
    params: dict[str, Any] | None = None,
    restart: Collection[JobState] = (JobState.FAILED,),
) -> Job:
    """Get or create the job with this kind and key. One that has ended in a state of `restart` is
    started again.
    """
    with transaction.atomic():
        job, is_new = Job.objects.get_or_create(
            kind=kind, key=key, defaults={"owner": user, "params": params or {}}
        )
        if is_new:
            JobSubject.objects.bulk_create(
                JobSubject(job=job, model=row._meta.label_lower, object_id=row.pk)
                for row in subjects
            )
        else:
            is_new = bool(
                Job.objects.filter(pk=job.pk, state__in=restart).update(
                    state=JobState.WAITING,
                    owner=user,
                    params=params or {},
                    progress_message="",
                    progress_done=0,
                    progress_total=0,
                    result={},
                    error="",
                    tries=0,
                    run_after=timezone.now(),
                )
            )
            job.refresh_from_db()
        if is_new:
            wake_worker_on_commit(job.pk)
    return job


def get_job(kind: str, key: str) -> Job:
    """The job with this kind and key, whatever its state. Reading it starts nothing.

    Raises:
        NotFound: it was never started.
    """
    job = Job.objects.filter(kind=kind, key=key).first()
    if job is None:
        raise NotFound(
            f"No such {kind} has been started. Start it with a POST.", code="not_started"
        )
    return job


def find_jobs_about(row: models.Model) -> models.QuerySet[Job]:
    return Job.objects.filter(
        subjects__model=row._meta.label_lower, subjects__object_id=row.pk
    ).order_by("pk")


def find_busy_ids(model: type[models.Model]) -> models.QuerySet[Any]:
    """The ids of the rows of a model that waiting or running jobs are about, as a subquery."""
    subjects = JobSubject.objects.filter(
        model=model._meta.label_lower, job__state__in=(JobState.WAITING, JobState.RUNNING)
    )
    return subjects.values("object_id")


def list_job_folders(job: Job) -> list[Path]:
    """All folders that a job writes."""
    return [job.folder, *KINDS[job.kind].output_folders(job)]
