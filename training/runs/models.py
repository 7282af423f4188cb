"""A run is one row with its current state, its events, and its curves in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.gpus.models import Pool
from training.people.models import Owned, Stored
from training.runs.states import Priority, RequestedAction, State


class Sweep(Owned):
    """Runs that were launched together with the combinations of a grid of settings."""

    name = models.CharField(max_length=120)
    grid: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField()
    # Label of each member that was not started -> the reason
    impossible: models.JSONField[dict[str, str], dict[str, str]] = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return self.name


class Run(Owned, Stored):
    """A training run. Units are seconds, bytes and steps. Lease times use the database's clock."""

    name = models.CharField(max_length=120)
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="runs")
    data = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="runs")
    method = models.CharField(max_length=40)
    config: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField()
    # The rest of the launch request (launch/request.py): goal and locks of Auto, the values of a
    # sweep, the adapter version that training starts from.
    request: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)
    # The adapter version whose weights training started from
    start_version = models.PositiveBigIntegerField(null=True)
    sweep = models.ForeignKey(Sweep, null=True, on_delete=models.SET_NULL, related_name="runs")
    # ",one,two,": one LIKE finds a tag, without another table or a join
    tags = models.CharField(max_length=320, blank=True)
    notes = models.TextField(blank=True)
    archived_at = models.DateTimeField(null=True)

    state = models.CharField(
        max_length=20, choices=State.choices, default=State.QUEUED, db_index=True
    )
    requested_action = models.CharField(
        max_length=20, choices=RequestedAction.choices, default=RequestedAction.RUN
    )
    message = models.TextField(blank=True)
    # Seconds of device time that an admin has waived
    waived_seconds = models.FloatField(default=0.0)
    # For a failed run: the engine's outcome, or `killed`
    failure = models.CharField(max_length=20, blank=True)
    # Null: no pool has reported yet
    pool = models.ForeignKey(Pool, null=True, on_delete=models.PROTECT, related_name="runs")
    priority = models.CharField(max_length=10, choices=Priority.choices, default=Priority.NORMAL)
    moved_up_at = models.DateTimeField(null=True)  # when it became the first of its owner's runs
    # Position, reason and estimated start while it waits (queue/queue_info.py)
    queue_info: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    queue_info_at = models.DateTimeField(null=True)  # when a worker last checked queue_info
    queued_at = models.DateTimeField()
    not_before = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    lease_owner = models.CharField(max_length=200, blank=True)
    lease_token = models.CharField(max_length=40, blank=True)
    lease_expires_at = models.DateTimeField(null=True)
    attempt = models.PositiveIntegerField(default=0)
    crash_count = models.PositiveIntegerField(default=0)

    last_seq = models.PositiveBigIntegerField(default=0)
    journal_offset = models.PositiveBigIntegerField(default=0)
    revision = models.PositiveBigIntegerField(default=0)
    phase = models.CharField(max_length=60, blank=True)
    phase_done = models.PositiveIntegerField(null=True)
    phase_total = models.PositiveIntegerField(null=True)
    step = models.PositiveIntegerField(default=0)
    total_steps = models.PositiveIntegerField(default=0)
    seconds_per_step = models.FloatField(null=True)
    tokens_per_second = models.FloatField(null=True)
    loss = models.FloatField(null=True)
    eval_loss = models.FloatField(null=True)
    best_eval_loss = models.FloatField(null=True)
    # Exact match of the exported adapter: the share of held-out prompts with the expected answer
    exact_match = models.FloatField(null=True)
    best_step = models.PositiveIntegerField(null=True)
    peak_memory_bytes = models.PositiveBigIntegerField(default=0)
    start_info: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    # Bytes, forecast/memory.py
    forecast: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    # A Plan of training/auto
    auto_plan: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    sparkline: models.JSONField[list[float], list[float]] = models.JSONField(default=list)

    class Meta:
        ordering = ["-created_at"]
        indexes = [
            models.Index(fields=["-created_at"]),
            models.Index(fields=["state", "queued_at"]),
            models.Index(fields=["owner", "-created_at"]),
            models.Index(fields=["team", "-created_at"]),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return Path(settings.HOME) / "runs" / str(self.pk)

    def list_folders(self) -> list[Path]:
        return [self.folder]

    def get_result_version(self) -> Any:
        """The adapter version of the run's best step; the newest one if the best step was not
        saved.
        """
        versions = self.versions.order_by("-pk")
        return versions.filter(step=self.best_step or self.step).first() or versions.first()

    @property
    def tag_list(self) -> list[str]:
        return [tag for tag in self.tags.split(",") if tag]


class Event(models.Model):
    """An event of the journal. Step events move into curve chunks, 512 at a time; other events stay
    rows.
    """

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="events")
    seq = models.PositiveBigIntegerField()
    kind = models.CharField(max_length=20)
    step = models.PositiveIntegerField(null=True)
    time = models.FloatField()
    fields: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField()
    superseded = models.BooleanField(default=False)

    class Meta:
        ordering = ["seq"]
        constraints = [models.UniqueConstraint(fields=["run", "seq"], name="unique_event_per_seq")]
        indexes = [models.Index(fields=["run", "kind", "seq"])]


class CurveChunk(models.Model):
    """Up to 512 consecutive step events. `superseded`: a later attempt resumed before these steps
    and trained them again.
    """

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="chunks")
    first_seq = models.PositiveBigIntegerField()
    last_seq = models.PositiveBigIntegerField()
    first_step = models.PositiveIntegerField()
    last_step = models.PositiveIntegerField()
    count = models.PositiveIntegerField()
    superseded = models.BooleanField(default=False)

    class Meta:
        ordering = ["first_seq"]
        constraints = [
            models.UniqueConstraint(fields=["run", "first_seq"], name="unique_chunk_per_seq")
        ]
        indexes = [models.Index(fields=["run", "superseded", "first_step"])]


class CurveColumn(models.Model):
    """One metric of a chunk's events: float64 values in order, and the summary that a zoomed-out
    chart needs.

    low, high and mean ignore values that are not finite; `values` has them all.
    """

    chunk = models.ForeignKey(CurveChunk, on_delete=models.CASCADE, related_name="columns")
    name = models.CharField(max_length=40)
    low = models.FloatField(null=True)
    high = models.FloatField(null=True)
    mean = models.FloatField(null=True)
    values = models.BinaryField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["chunk", "name"], name="unique_column_per_chunk")
        ]


MAX_NAME_LENGTH = 120


MAX_TAGS = 10


MAX_NOTES_LENGTH = 10_000
