"""The Data pages: the list of datasets with the examples, and a dataset's versions, rows and
statistics.
"""

from __future__ import annotations

from django.contrib import messages
from django.db.models import Prefetch
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
from training.people.pagination import paginate
from training.people.permissions import get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero

DATASETS_PER_PAGE = 50
DRAFTS_PER_PAGE = 20
VERSIONS_PER_PAGE = 20


@require_safe
def list_datasets(request: AuthenticatedRequest) -> HttpResponse:
    newest_version = Prefetch(
        "versions", queryset=DatasetVersion.objects.defer("report")[:1], to_attr="newest_version"
    )
    rows = (
        Dataset.objects.visible_to(request.user)
        .select_related("owner", "team")
        .prefetch_related(newest_version)
    )
    used_sources = set(
        Dataset.objects.filter(
            owner=request.user, source__in=[example.source for example in EXAMPLES.values()]
        ).values_list("source", flat=True)
    )
    drafts = Upload.objects.filter(owner=request.user, dataset=None).exclude(state=UploadState.DONE)
    values = {
        "page": paginate(request, rows, DATASETS_PER_PAGE),
        "examples": [one for one in EXAMPLES.values() if one.source not in used_sources],
        "drafts": paginate(request, drafts, DRAFTS_PER_PAGE, "drafts"),
    }
    return render(request, "datasets/datasets.html", values)


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
    version = find_version(dataset, request.GET.get("version", ""))
    split = request.GET.get("split", "train")
    split = split if split in SPLITS else "train"
    page = paginate(request, range(version.count_rows(split)), ROWS_PER_PAGE)
    start = (page.number - 1) * ROWS_PER_PAGE
    context = {
        "dataset": dataset,
        "version": version,
        "versions": paginate(
            request, dataset.versions.defer("report"), VERSIONS_PER_PAGE, "versions"
        ),
        "split": split,
        "splits": [(name, title, version.count_rows(name)) for name, title in SPLITS.items()],
        "rows": list(enumerate(load_turns(version, split, start), start=start + 1)),
        "page": page,
        "start": start,
    }
    return render(request, "datasets/dataset.html", context)


def find_version(dataset: Dataset, requested: str) -> DatasetVersion:
    """The requested version, by default the newest. Raises NotFound."""
    versions = dataset.versions.select_related("upload")
    if requested:
        versions = versions.filter(number=parse_int_or_zero(requested))
    version: DatasetVersion | None = versions.first()
    if version is None:
        raise NotFound(f"Version {requested[:20]} of this dataset not found.")
    return version


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
