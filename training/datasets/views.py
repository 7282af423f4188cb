"""The Data pages: the list of datasets with the examples, and a dataset's versions, rows and
statistics.
"""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from training.datasets import services
from training.datasets.examples import EXAMPLES, add_example
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.preview import ROWS_PER_PAGE, load_turns
from training.datasets.rows import SPLITS
from training.errors import NotFound
from training.formatting import format_bytes
from training.people.permissions import get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero


@require_safe
def list_datasets(request: AuthenticatedRequest) -> HttpResponse:
    rows = (
        Dataset.objects.visible_to(request.user)
        .select_related("owner", "team")
        .prefetch_related("versions")
    )
    used_sources = {row.source for row in rows if row.owner_id == request.user.pk}
    examples = [example for example in EXAMPLES.values() if example.source not in used_sources]
    drafts = Upload.objects.filter(owner=request.user, dataset=None).exclude(state=UploadState.DONE)
    return render(
        request,
        "datasets/datasets.html",
        {"datasets": rows, "examples": examples, "drafts": drafts},
    )


@require_POST
def use_example(request: AuthenticatedRequest, key: str) -> HttpResponse:
    version = add_example(request.user, key)
    messages.success(
        request, f"{version.dataset.name} is ready: {version.train_rows:,} training rows."
    )
    return redirect("dataset", version.dataset_id)


@require_safe
def show_dataset(request: AuthenticatedRequest, dataset_id: int) -> HttpResponse:
    """The rows of a dataset; `?version=N` shows an older version."""
    dataset = get_visible(Dataset, request.user, dataset_id, "owner", "team")
    versions = list(dataset.versions.select_related("upload"))
    version = find_version(versions, request.GET.get("version", ""))
    split = request.GET.get("split", "train")
    split = split if split in SPLITS else "train"
    total = version.count_rows(split)
    page = min(
        max(1, parse_int_or_zero(request.GET.get("page", "1"))), max(1, -(-total // ROWS_PER_PAGE))
    )
    start = (page - 1) * ROWS_PER_PAGE
    context = {
        "dataset": dataset,
        "version": version,
        "versions": versions,
        "split": split,
        "splits": [(name, title, version.count_rows(name)) for name, title in SPLITS.items()],
        "rows": list(enumerate(load_turns(version, split, start), start=start + 1)),
        "total": total,
        "page": page,
        "start": start,
        "pages": max(1, -(-total // ROWS_PER_PAGE)),
    }
    return render(request, "datasets/dataset.html", context)


def find_version(versions: list[DatasetVersion], requested: str) -> DatasetVersion:
    wanted = parse_int_or_zero(requested) if requested else versions[0].number
    for version in versions:
        if version.number == wanted:
            return version
    raise NotFound(f"Version {requested[:20]} of this dataset not found.")


@require_POST
def rename_dataset(request: AuthenticatedRequest, dataset_id: int) -> HttpResponse:
    services.rename_dataset(
        request.user, get_visible(Dataset, request.user, dataset_id), request.POST.get("name", "")
    )
    return redirect("dataset", dataset_id)


@require_POST
def delete_dataset(request: AuthenticatedRequest, dataset_id: int) -> HttpResponse:
    dataset = get_visible(Dataset, request.user, dataset_id)
    freed = services.delete_dataset(request.user, dataset, request.POST.get("name", ""))
    messages.success(request, f"{dataset.name} was deleted, which freed {format_bytes(freed)}.")
    return redirect("datasets")
