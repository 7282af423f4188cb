"""Models for trained adapters: versions, deployments, and the data for comparing versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import Q

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.methods import METHODS
from training.engine.methods.base import Method
from training.people.models import Owned, Stored, User
from training.runs.models import Run


class AdapterVersion(Owned, Stored):
    """The weights of a checkpoint, copied from the run's folder so that they outlive it. Immutable.

    `provenance` records how the version was made: settings, seed, data, base model and its
    revision, library versions and costs.
    """

    name = models.CharField(max_length=120)
    number = models.PositiveIntegerField()
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="adapters")
    run = models.ForeignKey(Run, null=True, on_delete=models.SET_NULL, related_name="versions")
    data = models.ForeignKey(DatasetVersion, null=True, on_delete=models.SET_NULL, related_name="+")
    parent = models.ForeignKey(
        "self", null=True, on_delete=models.SET_NULL, related_name="children"
    )
    method = models.CharField(max_length=40)
    step = models.PositiveIntegerField()
    sha256 = models.CharField(max_length=64)  # of the weights
    provenance: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    # In the format of a run's tags: ",candidate,production,"
    tags = models.CharField(max_length=320, blank=True)
    notes = models.TextField(blank=True)
    exact_match = models.FloatField(null=True)
    eval_loss = models.FloatField(null=True)
    trainable_parameters = models.PositiveBigIntegerField(default=0)
    size_bytes = models.PositiveBigIntegerField()
    files: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["base_model__name", "name", "-number"]
        verbose_name = "adapter version"
        constraints = [
            models.UniqueConstraint(
                fields=["owner", "name", "number"], name="unique_number_per_adapter"
            ),
            models.UniqueConstraint(
                fields=["run", "step", "sha256"],
                condition=Q(run__isnull=False),
                name="unique_version_per_step",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"

    @property
    def method_spec(self) -> Method:
        return METHODS[self.method]

    @property
    def is_full_model(self) -> bool:
        return self.method_spec.is_full_finetuning

    @property
    def tag_list(self) -> list[str]:
        return [tag for tag in self.tags.split(",") if tag]

    @property
    def comparison_default(self) -> AdapterVersion | None:
        """The version to compare this one with by default: its parent, else the newest older
        version of the same base and data.
        """
        candidates = AdapterVersion.objects.filter(
            owner=self.owner_id, team=self.team_id, base_model=self.base_model_id, pk__lt=self.pk
        )
        same_data = (
            candidates.filter(data=self.data_id)
            if self.data_id
            else candidates.filter(name=self.name)
        )
        return candidates.filter(pk=self.parent_id).first() or same_data.order_by("-pk").first()

    @property
    def folder(self) -> Path:
        return Path(settings.HOME) / "adapters" / str(self.pk)

    @property
    def merged_folder(self) -> Path:
        """The folder of the merged model, which exists after a merge (export/merge.py)."""
        return Path(settings.HOME) / "merged" / str(self.pk)

    @property
    def gguf_folder(self) -> Path:
        """The folder of the exported GGUF files (export/gguf.py)."""
        return Path(settings.HOME) / "merged" / f"{self.pk}-gguf"

    def list_folders(self) -> list[Path]:
        return [self.folder, self.merged_folder, self.gguf_folder]


class VersionCounter(models.Model):
    """The last version number used for a name. The number of a deleted version is never reused."""

    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="+")
    name = models.CharField(max_length=120)
    last_number = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["owner", "name"], name="unique_counter_per_name")
        ]


class Deployment(Owned):
    """A stable name that serves one version, or two that split the traffic: `canary` gets
    `canary_percent` percent of the requests.
    """

    name = models.SlugField(max_length=63, unique=True)
    version = models.ForeignKey(
        AdapterVersion, on_delete=models.PROTECT, related_name="deployments"
    )
    canary = models.ForeignKey(
        AdapterVersion, null=True, on_delete=models.PROTECT, related_name="canary_deployments"
    )
    canary_percent = models.PositiveSmallIntegerField(default=0)
    # Serve the merged model once it exists, else the base model with the adapter attached
    use_merged = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class DeploymentChange(models.Model):
    """An entry in a deployment's history. Its labels remain when a version is deleted."""

    deployment = models.ForeignKey(Deployment, on_delete=models.CASCADE, related_name="changes")
    at = models.DateTimeField(auto_now_add=True)
    by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    version = models.ForeignKey(
        AdapterVersion, null=True, on_delete=models.SET_NULL, related_name="+"
    )
    canary = models.ForeignKey(
        AdapterVersion, null=True, on_delete=models.SET_NULL, related_name="+"
    )
    label = models.CharField(max_length=140)
    canary_label = models.CharField(max_length=140, blank=True)
    canary_percent = models.PositiveSmallIntegerField(default=0)
    use_merged = models.BooleanField(default=True)
    description = models.CharField(max_length=200)

    class Meta:
        ordering = ["-pk"]


class RequestLog(models.Model):
    """One request that a deployment served. Logs are deleted after a week (serving/usage.py);
    `UsageCounter` keeps the totals.
    """

    deployment = models.ForeignKey(
        Deployment, on_delete=models.CASCADE, related_name="request_logs"
    )
    version = models.ForeignKey(AdapterVersion, on_delete=models.CASCADE, related_name="+")
    at = models.DateTimeField()
    seconds = models.FloatField()
    first_token_seconds = models.FloatField(null=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    failed = models.BooleanField(default=False)

    class Meta:
        indexes = [models.Index(fields=["deployment", "at"])]


class UsageCounter(models.Model):
    """How many requests of a deployment a version has served in total."""

    deployment = models.ForeignKey(
        Deployment, on_delete=models.CASCADE, related_name="usage_counters"
    )
    version = models.ForeignKey(AdapterVersion, on_delete=models.CASCADE, related_name="+")
    answers = models.PositiveBigIntegerField(default=0)
    failures = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["deployment", "version"], name="unique_counter_per_version"
            )
        ]


class PromptSet(Owned):
    """Prompts for comparing versions. `rows`: `[{"messages": [...], "expected": "..."}]`."""

    name = models.CharField(max_length=120)
    # The dataset that the prompts were drawn from
    data = models.ForeignKey(DatasetVersion, null=True, on_delete=models.SET_NULL, related_name="+")
    rows: models.JSONField[list[Any], list[Any]] = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "prompt set"

    def __str__(self) -> str:
        return self.name


class Reply(models.Model):
    """The greedy reply of a version (null: of the base model) to a row of a prompt set, and its
    scores (scores.py).
    """

    prompts = models.ForeignKey(PromptSet, on_delete=models.CASCADE, related_name="replies")
    row = models.PositiveIntegerField()
    version = models.ForeignKey(
        AdapterVersion, null=True, on_delete=models.CASCADE, related_name="replies"
    )
    base_model = models.ForeignKey(BaseModel, on_delete=models.CASCADE, related_name="+")
    text = models.TextField()
    scores: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    tokens = models.PositiveIntegerField(default=0)
    seconds = models.FloatField(default=0.0)

    class Meta:
        ordering = ["row"]
        constraints = [
            models.UniqueConstraint(
                fields=["prompts", "row", "version"],
                condition=Q(version__isnull=False),
                name="unique_reply_per_row",
            ),
            models.UniqueConstraint(
                fields=["prompts", "row", "base_model"],
                condition=Q(version=None),
                name="unique_base_reply_per_row",
            ),
        ]


class Vote(models.Model):
    """A person's blind choice between two versions' replies to a row: `first`, `second`
    or `tie`.
    """

    prompts = models.ForeignKey(PromptSet, on_delete=models.CASCADE, related_name="votes")
    row = models.PositiveIntegerField()
    first = models.ForeignKey(AdapterVersion, on_delete=models.CASCADE, related_name="+")
    second = models.ForeignKey(AdapterVersion, on_delete=models.CASCADE, related_name="+")
    voter = models.ForeignKey(User, on_delete=models.CASCADE, related_name="+")
    choice = models.CharField(max_length=6)
    at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["prompts", "row", "first", "second", "voter"], name="unique_vote_per_row"
            )
        ]


def file_stem(version: AdapterVersion) -> str:
    """A file name for a version, safe in HTTP headers and on every file system."""
    safe = (
        "".join(c if c.isascii() and c.isalnum() else "-" for c in version.name).strip("-")
        or "adapter"
    )
    return f"{safe}-v{version.number}"
