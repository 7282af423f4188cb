"""The Data pages: the list with its examples, the upload with its named problems, and a set's rows."""

from __future__ import annotations

from typing import BinaryIO, cast

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.datasets.examples import EXAMPLES, add_example
from training.datasets.intake import BadData, bounded_lines, create_dataset
from training.datasets.models import Dataset
from training.datasets.preview import SHOWN_ROWS, first_rows
from training.datasets.uploads import limit_words, was_too_large
from training.errors import TooLarge, UserError
from training.people.requests import SignedIn
from training.people.visible import get_visible


def datasets(request: SignedIn) -> HttpResponse:
    rows = Dataset.objects.visible_to(request.user).select_related("owner", "team").prefetch_related("versions")
    taken = {row.source for row in rows if row.owner_id == request.user.pk}
    examples = [example for example in EXAMPLES.values() if example.source not in taken]
    return render(request, "datasets/datasets.html", {"datasets": rows, "examples": examples})


@require_POST
def use_example(request: SignedIn, key: str) -> HttpResponse:
    version = add_example(request.user, key)
    messages.success(request, f"{version.dataset.name} is ready: {version.train_rows:,} rows to train on.")
    return redirect("dataset", version.dataset_id)


def new(request: SignedIn) -> HttpResponse:
    if request.method != "POST":
        return render(request, "datasets/new.html", {"limit": limit_words()})
    uploaded = request.FILES.get("file")
    try:
        if was_too_large(request):
            raise TooLarge(f"The file is larger than {limit_words()}; nothing of it was kept.", field="file")
        if uploaded is None or uploaded.name is None or uploaded.file is None:
            raise UserError("Choose a JSONL file first.", field="file")
        version = create_dataset(
            request.user,
            request.POST.get("name", "").strip() or uploaded.name.rsplit(".", 1)[0],
            bounded_lines(cast(BinaryIO, uploaded.file)),
            source=f"upload: {uploaded.name}"[:200],
            leave_out=request.POST.get("leave_out") == "on",
        )
    except UserError as error:
        values = {"error": error, "name": request.POST.get("name", ""), "limit": limit_words()}
        if isinstance(error, BadData):
            values |= {"problems": error.problems, "count": error.count}
        return render(request, "datasets/new.html", values, status=error.status)
    messages.success(request, f"{version.train_rows:,} rows to train on, {version.heldout_rows:,} held out.")
    return redirect("dataset", version.dataset_id)


def dataset(request: SignedIn, dataset_id: int) -> HttpResponse:
    found = get_visible(Dataset, request.user, dataset_id, "owner", "team")
    version = found.versions.latest("number")
    split = request.GET.get("split", "train")
    split = split if split in ("train", "heldout", "test") else "train"
    total = {"train": version.train_rows, "heldout": version.heldout_rows, "test": version.test_rows}[split]
    page = min(max(1, whole(request.GET.get("page", "1"))), max(1, -(-total // SHOWN_ROWS)))
    start = (page - 1) * SHOWN_ROWS
    values = {
        "dataset": found,
        "version": version,
        "split": split,
        "splits": (
            ("train", "To train on", version.train_rows),
            ("heldout", "Held out", version.heldout_rows),
            ("test", "Test", version.test_rows),
        ),
        "rows": list(enumerate(first_rows(version, split, start), start=start + 1)),
        "total": total,
        "page": page,
        "pages": max(1, -(-total // SHOWN_ROWS)),
    }
    return render(request, "datasets/dataset.html", values)


def whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 1
