"""Datasets in the admin site, read only: versions are immutable, and only services.py frees the
disk space of what it deletes.
"""

from django.contrib import admin

from training.datasets.models import Dataset, DatasetVersion, Upload
from training.people.admin import ReadOnlyAdmin


@admin.register(Dataset)
class DatasetAdmin(ReadOnlyAdmin):
    list_display = ("name", "owner", "team", "source", "created_at")
    list_select_related = ("owner", "team")
    search_fields = ("name",)


@admin.register(DatasetVersion)
class DatasetVersionAdmin(ReadOnlyAdmin):
    list_display = (
        "dataset",
        "number",
        "rows",
        "train_rows",
        "eval_rows",
        "test_rows",
        "digest",
    )
    list_select_related = ("dataset",)


@admin.register(Upload)
class UploadAdmin(ReadOnlyAdmin):
    list_display = ("name", "owner", "state", "job", "bytes", "created_at")
    list_filter = ("state",)
    list_select_related = ("owner",)
