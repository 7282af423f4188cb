"""The base models that runs can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models

from training.people.models import Stored, User


class Source(models.TextChoices):
    BUILTIN = "builtin", "Built in"
    FOLDER = "folder", "Folder on the server"
    HUB = "hub", "Hugging Face Hub"


class ModelState(models.TextChoices):
    WAITING = "waiting", "Waiting"
    IMPORTING = "importing", "Importing"
    READY = "ready", "Ready"
    FAILED = "failed", "Failed"


class BaseModel(Stored):
    """A base model in the catalog with the metadata of its files. All users can read it; admins add
    models.
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
        """The folder of the safetensors files: the registered folder itself, or a folder under
        SNAPML_HOME for imported models.
        """
        if self.source == Source.FOLDER:
            return Path(self.location)
        return Path(settings.HOME) / "models" / str(self.pk)

    def list_folders(self) -> list[Path]:
        return [] if self.source == Source.FOLDER else [self.folder]
