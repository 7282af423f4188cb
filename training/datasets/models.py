"""Datasets, their immutable, content-addressed versions, and the uploads from which versions are
built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.people.models import Owned, Stored


class Dataset(Owned):
    name = models.CharField(max_length=120)
    source = models.CharField(max_length=200)
    license = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return self.name


class UploadState(models.TextChoices):
    DRAFT = "draft", "Needs mapping"
    WAITING = "waiting", "Waiting"
    WORKING = "working", "In progress"
    CHECKED = "checked", "Checked"
    FAILED = "failed", "Failed"
    DONE = "done", "Saved"


class Upload(Owned, Stored):
    """Uploaded files, from which versions are built. They are kept, so that a user can correct the
    mapping and save a new version.

    `files` is `[{"file", "name", "split", "format"}]`. `job` is what the worker has to do: check,
    save or fetch.
    """

    name = models.CharField(max_length=120)
    source = models.CharField(max_length=200)
    dataset = models.ForeignKey(
        Dataset, null=True, on_delete=models.CASCADE, related_name="uploads"
    )
    state = models.CharField(
        max_length=20, choices=UploadState.choices, default=UploadState.DRAFT, db_index=True
    )
    job = models.CharField(max_length=10, blank=True)
    bytes = models.PositiveBigIntegerField(default=0)
    files: models.JSONField[list[Any], list[Any]] = models.JSONField(default=list)
    mapping: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    build_options: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    report: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    progress_message = models.CharField(max_length=200, blank=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    @property
    def folder(self) -> Path:
        return Path(settings.HOME) / "uploads" / str(self.pk)

    def list_folders(self) -> list[Path]:
        return [self.folder]


class DatasetVersion(Stored):
    """The rows of a dataset at one time. `digest` is the SHA-256 of the content and the name of
    the folder with the files.
    """

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="versions")
    upload = models.ForeignKey(
        Upload, null=True, on_delete=models.SET_NULL, related_name="versions"
    )
    number = models.PositiveIntegerField()
    digest = models.CharField(max_length=64)
    rows = models.PositiveIntegerField()
    train_rows = models.PositiveIntegerField()
    eval_rows = models.PositiveIntegerField()
    test_rows = models.PositiveIntegerField(default=0)
    skipped_rows = models.PositiveIntegerField(default=0)
    mapping: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    build_options: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    report: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-number"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="unique_version_number")
        ]

    def __str__(self) -> str:
        return f"{self.dataset.name} v{self.number}"

    def count_rows(self, split: str) -> int:
        """Rows of `train`, `eval` or `test`."""
        return {"train": self.train_rows, "eval": self.eval_rows, "test": self.test_rows}[split]

    @property
    def folder(self) -> Path:
        """Shared with versions of the same content."""
        return Path(settings.HOME) / "data" / self.digest

    def list_folders(self) -> list[Path]:
        """Empty if an older version of the owner has the same content."""
        owner = Dataset.objects.filter(pk=self.dataset_id).values("owner")
        older = DatasetVersion.objects.filter(digest=self.digest, pk__lt=self.pk)
        return [] if older.filter(dataset__owner__in=owner).exists() else [self.folder]

    def split_path(self, split: str) -> Path:
        """The JSONL of `train`, `eval` or `test`."""
        return self.folder / f"{split}.jsonl"
