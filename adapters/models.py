"""What came out of training: adapters on a shelf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.catalog.models import BaseModel
from training.engine.methods import TABLE
from training.people.models import Owned
from training.runs.models import Run


class AdapterVersion(Owned):
    """An adapter that a run left, copied out of the run's folder so that it outlives it."""

    name = models.CharField(max_length=120)
    number = models.PositiveIntegerField()
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="adapters")
    run = models.OneToOneField(Run, null=True, on_delete=models.SET_NULL, related_name="adapter")
    method = models.CharField(max_length=40)
    step = models.PositiveIntegerField()
    exact_match = models.FloatField(null=True)
    heldout_loss = models.FloatField(null=True)
    trainable_parameters = models.PositiveBigIntegerField(default=0)
    size_bytes = models.PositiveBigIntegerField()
    files: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["base_model__name", "name", "-number"]
        constraints = [models.UniqueConstraint(fields=["owner", "name", "number"], name="one_number_an_adapter")]

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return str(next(facts["sha256"] for name, facts in self.files.items() if name.endswith(".safetensors")))

    @property
    def whole_model(self) -> bool:
        return TABLE[self.method].whole_model

    @property
    def folder(self) -> Path:
        return Path(settings.HOME) / "adapters" / str(self.pk)
