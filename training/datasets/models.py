"""Data sets and their immutable, content-addressed versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.people.models import Owned


class Dataset(Owned):
    name = models.CharField(max_length=120)
    source = models.CharField(max_length=200)
    licence = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return self.name


class DatasetVersion(models.Model):
    """Rows as they were at one time. `digest` is the SHA-256 of its files' content and names the folder that holds them."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField()
    digest = models.CharField(max_length=64)
    rows = models.PositiveIntegerField()
    train_rows = models.PositiveIntegerField()
    heldout_rows = models.PositiveIntegerField()
    test_rows = models.PositiveIntegerField(default=0)
    left_out = models.PositiveIntegerField(default=0)
    problems: models.JSONField[list[Any], list[Any]] = models.JSONField(default=list)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-number"]
        constraints = [models.UniqueConstraint(fields=["dataset", "number"], name="one_number_a_version")]

    def __str__(self) -> str:
        return f"{self.dataset.name} v{self.number}"

    def file(self, split: str) -> Path:
        """The JSONL of `train`, `heldout` or `test`."""
        return Path(settings.HOME) / "data" / self.digest / f"{split}.jsonl"
