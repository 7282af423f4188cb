"""Renames and deletes datasets, and discards uploads."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import ProtectedError

from training.datasets.models import Dataset, DatasetVersion, Upload
from training.datasets.upload_job import lock_data_folder
from training.datasets.uploads import BUSY_STATES
from training.engine.files import remove_tree
from training.errors import Conflict, UserError, check_name_typed, to_one_line
from training.people.models import User
from training.people.permissions import check_changeable


def rename_dataset(user: User, dataset: Dataset, name: str) -> None:
    check_changeable(user, dataset)
    if not to_one_line(name):
        raise UserError("Enter a name for the dataset.", field="name")
    dataset.name = to_one_line(name)[:120]
    dataset.save(update_fields=["name"])


def delete_dataset(user: User, dataset: Dataset, name: str) -> int:
    """Delete a dataset with its versions and uploads. Returns the bytes freed; files that another
    dataset shares are kept.

    Raises:
        Conflict: a run uses it, or the worker is reading one of its uploads.
        UserError: `name` is not its name.
    """
    check_changeable(user, dataset)
    check_name_typed(name, dataset.name)
    if dataset.uploads.filter(state__in=BUSY_STATES).exists():
        raise Conflict(
            f"An upload of {dataset.name} is being processed. Wait for it, or discard it.",
            code="busy",
        )
    digests = set(dataset.versions.values_list("digest", flat=True))
    folders = [upload.folder for upload in dataset.uploads.all()]
    try:
        with lock_data_folder(exclusive=True):
            with transaction.atomic():
                Dataset.objects.filter(pk=dataset.pk).delete()
            shared_digests = set(
                DatasetVersion.objects.filter(digest__in=digests).values_list("digest", flat=True)
            )
            folders += [
                Path(settings.HOME) / "data" / digest for digest in digests - shared_digests
            ]
            freed = sum(remove_tree(folder) for folder in folders)
            # Equal content counts for the oldest version of an owner, which may now be another one
            for version in DatasetVersion.objects.filter(digest__in=shared_digests):
                version.update_disk_bytes()
    except BlockingIOError as error:
        raise Conflict("Another dataset is being saved. Try again in a minute.") from error
    except ProtectedError as error:
        count = len(error.protected_objects)
        runs = f"{count} run{'' if count == 1 else 's'}"
        raise Conflict(
            f"{dataset.name} is used by {runs}. Delete them first.", code="in_use"
        ) from error
    return freed


def discard_upload(user: User, upload: Upload) -> None:
    """Delete an upload that has no versions. A worker that is processing it stops.

    Raises:
        Conflict: the upload has versions.
    """
    check_changeable(user, upload)
    if upload.versions.exists():
        raise Conflict("This upload has saved versions. Delete the dataset instead.")
    folder = upload.folder
    Upload.objects.filter(pk=upload.pk).delete()
    remove_tree(folder)
