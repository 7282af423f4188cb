"""Base models that a run may start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.people.models import User


class Source(models.TextChoices):
    BUILTIN = "builtin", "Built in"
    FOLDER = "folder", "Folder on the server"
    HUB = "hub", "Hugging Face hub"


class ModelState(models.TextChoices):
    WAITING = "waiting", "Waiting"
    IMPORTING = "importing", "Importing"
    READY = "ready", "Ready"
    FAILED = "failed", "Failed"


class BaseModel(models.Model):
    """A base model and what its files say of it. Everyone may read it, admins add to the
    catalog.
    """

    name = models.CharField(max_length=200, unique=True)
    source = models.CharField(max_length=20, choices=Source.choices)
    location = models.CharField(max_length=500)
    revision = models.CharField(max_length=100, blank=True)
    state = models.CharField(max_length=20, choices=ModelState.choices, default=ModelState.WAITING)
    progress = models.FloatField(default=0)
    progress_message = models.CharField(max_length=200, blank=True)
    error = models.TextField(blank=True)
    metadata: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    added_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        """Where the safetensors lie: a folder stays where it is, all else is imported under
        SNAPML_HOME.
        """
        if self.source == Source.FOLDER:
            return Path(self.location)
        return Path(settings.HOME) / "models" / str(self.pk)
