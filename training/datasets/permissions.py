"""The dataset versions that a user may train on."""

from __future__ import annotations

from training.datasets.models import Dataset, DatasetVersion
from training.errors import NotFound
from training.people.models import User


def get_visible_version(user: User, version_id: int) -> DatasetVersion:
    """Raises NotFound, also if the version exists but the user may not see it."""
    version = find_visible_version(user, version_id)
    if version is None:
        raise NotFound(f"Dataset version {version_id} not found.", field="data")
    return version


def find_visible_version(user: User, version_id: int) -> DatasetVersion | None:
    """The version, or None: both if it does not exist and if the user may not see it."""
    visible_datasets = Dataset.objects.visible_to(user).values("pk")
    return (
        DatasetVersion.objects.select_related("dataset__team")
        .filter(pk=version_id, dataset__in=visible_datasets)
        .first()
    )
