"""Background jobs. The rows are authoritative: a worker claims a job's row before it runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models
from django.utils import timezone

from training.people.models import User


class JobState(models.TextChoices):
    WAITING = "waiting", "Waiting"
    RUNNING = "running", "Running"
    DONE = "done", "Done"
    FAILED = "failed", "Failed"


OPEN_STATES = (JobState.WAITING, JobState.RUNNING)


class Job(models.Model):
    """A task for a worker. `key` identifies what it is about. There is one job per kind and key, so
    the same work is never done twice.
    """

    kind = models.CharField(max_length=20)
    key = models.CharField(max_length=200)
    owner = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    params: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    state = models.CharField(max_length=10, choices=JobState.choices, default=JobState.WAITING)
    progress_message = models.CharField(max_length=200, blank=True)
    progress_done = models.PositiveIntegerField(default=0)
    progress_total = models.PositiveIntegerField(default=0)
    result: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    error = models.TextField(blank=True)
    tries = models.PositiveIntegerField(default=0)
    run_after = models.DateTimeField(default=timezone.now)
    claim_token = models.CharField(max_length=32, blank=True)  # new with every claim
    worker = models.CharField(max_length=300, blank=True)  # the process that claimed it
    heartbeat_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["kind", "key"], name="unique_job_per_key")]
        indexes = [models.Index(fields=["state", "run_after"], name="jobs_open")]

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"

    @property
    def is_open(self) -> bool:
        return self.state in OPEN_STATES

    @property
    def folder(self) -> Path:
        return Path(settings.HOME) / "jobs" / str(self.pk)


class JobSubject(models.Model):
    """A row that a job is about. When it is deleted, the job is deleted too (kinds.py)."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="subjects")
    model = models.CharField(max_length=60)  # as in "adapters.adapterversion"
    object_id = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["model", "object_id", "job"], name="unique_subject_per_job"
            )
        ]
