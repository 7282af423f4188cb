"""From a file in the browser to a version: upload or paste, map the columns, check, look at the
findings, save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from training.datasets import intake
from training.datasets.build import Choices
from training.datasets.formats import DELIMITERS, UNITS
from training.datasets.forms import FORMS, PARTS, Mapped
from training.datasets.intake import Named
from training.datasets.models import Dataset, Upload, UploadState
from training.datasets.preview import preview
from training.datasets.shelf import forget_upload
from training.datasets.uploads import limit_words, pasted, was_too_large
from training.errors import TooLarge, UserError
from training.people.requests import AuthenticatedRequest, parse_id
from training.people.visible import get_changeable, get_visible

MOST_COLUMNS_SHOWN = 200


def new(request: AuthenticatedRequest) -> HttpResponseBase:
    """`?dataset=ID` adds a version to a set that is there."""
    asked = parse_id(request.POST.get("dataset") or request.GET.get("dataset") or "")
    dataset = get_changeable(Dataset, request.user, asked) if asked else None
    values: dict[str, Any] = {
        "limit": limit_words(),
        "limit_bytes": settings.DATASET_MAX_BYTES,
        "dataset": dataset,
    }
    if request.method != "POST":
        return render(request, "datasets/new.html", values)
    scripted = "application/json" in request.headers.get("Accept", "")
    try:
        upload = take(request, dataset)
    except UserError as error:
        if scripted:
            raise
        kept = {name: request.POST.get(name, "") for name in ("name", "rows", "hub_id")}
        return render(
            request,
            "datasets/new.html",
            {**values, "error": error, "kept": kept},
            status=error.status,
        )
    address = reverse("upload", args=[upload.pk])
    return JsonResponse({"url": address}) if scripted else redirect(address)


def take(request: AuthenticatedRequest, dataset: Dataset | None) -> Upload:
    if was_too_large(request):
        raise TooLarge(
            f"The upload is larger than {limit_words()}; nothing of it was kept.", field="file"
        )
    name = request.POST.get("name", "").strip()
    if hub_id := request.POST.get("hub_id", "").strip():
        return intake.order_from_hub(request.user, hub_id, name=name, dataset=dataset)
    rows = request.POST.get("rows", "")
    files = [named(request.FILES.get("file"), ""), named(request.FILES.get("heldout"), "heldout")]
    given = [file for file in files if file is not None]
    if files[0] is None and rows.strip():
        given = [pasted(rows), *given]
        return intake.receive(
            request.user, given, name=name or "Pasted rows", source="pasted", dataset=dataset
        )
    if files[0] is None:
        raise UserError("Choose a file, paste rows, or name a data set of the hub.", field="file")
    return intake.receive(
        request.user, given, name=name, source=f"upload: {given[0][1]}", dataset=dataset
    )


def named(file: Any, split: str) -> Named | None:
    if file is None:
        return None
    return Path(file.temporary_file_path()), str(file.name), split


def upload(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """One page for the whole way; what it shows depends on the upload's state."""
    found = get_visible(Upload, request.user, upload_id, "dataset", "owner")
    fragment = request.headers.get("HX-Request") and request.headers.get("HX-Target") == "upload"
    return render(
        request, "datasets/_upload.html" if fragment else "datasets/upload.html", page_values(found)
    )


def page_values(found: Upload) -> dict[str, Any]:
    values: dict[str, Any] = {
        "upload": found,
        "moving": found.state in intake.BUSY,
        "versions": found.versions.all(),
    }
    if found.state in (UploadState.DRAFT, UploadState.FAILED) and found.mapped:
        values |= mapping_values(found, Mapped(**found.mapped))
    return values


def mapping_values(found: Upload, mapped: Mapped) -> dict[str, Any]:
    read = intake.form_of(found)
    rows = preview(found, mapped) if mapped.complete else []
    return {
        "read": read,
        "delimiters": DELIMITERS.items(),
        "units": UNITS.items(),
        "forms": FORMS.items(),
        "mapped": mapped,
        "columns": intake.column_names(found)[:MOST_COLUMNS_SHOWN],
        "parts": [
            (part, needed, mapped.columns.get(part, "")) for part, needed in PARTS[mapped.form]
        ],
        "rows": rows,
    }


def posted_mapping(request: AuthenticatedRequest, found: Upload) -> dict[str, Any]:
    form = request.POST.get("form", "")
    changed = form != found.mapped.get("form")
    columns = {part: request.POST.get(f"column-{part}", "") for part, _ in PARTS.get(form, ())}
    if changed:  # another form has other parts: columns of the same name are taken
        names = intake.column_names(found)
        columns = {part: columns.get(part) or (part if part in names else "") for part in columns}
    return {"form": form, "columns": columns, "split": request.POST.get("split", "")}


def reading_of(request: AuthenticatedRequest) -> dict[str, Any]:
    reading: dict[str, Any] = {
        name: request.POST[name] for name in ("delimiter", "unit") if name in request.POST
    }
    return reading | ({"header": "header" in request.POST} if "has_header" in request.POST else {})


def reads_otherwise(request: AuthenticatedRequest, found: Upload) -> bool:
    """Was the way to read the file changed, and not only what its columns mean?"""
    now = intake.form_of(found).to_dict()
    return any(now[name] != value for name, value in reading_of(request).items())


@require_POST
def map_columns(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """A change in the dialog: stored, and the preview with it sent back at once. With `check`, the
    whole file is read.
    """
    found = get_changeable(Upload, request.user, upload_id, "dataset", "owner")
    values = posted_mapping(request, found)
    try:
        if reads_otherwise(request, found):
            intake.set_reading(found, reading_of(request))
        else:
            intake.set_mapping(found, values)
            if request.POST.get("check"):
                intake.ask_for_check(found)
    except UserError as error:
        if error.status != 400 or values["form"] not in FORMS:
            raise
        mapped = Mapped(
            values["form"], {k: v for k, v in values["columns"].items() if v}, values["split"]
        )
        shown = {"upload": found, **mapping_values(found, mapped), "error": error}
        return render(request, "datasets/_upload.html", shown)
    return render(request, "datasets/_upload.html", page_values(found))


@require_POST
def save(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    found = get_changeable(Upload, request.user, upload_id, "dataset", "owner")
    try:
        choices = Choices(
            drop_same=request.POST.get("drop_same") == "on",
            drop_alike=request.POST.get("drop_alike") == "on",
            heldout_share=share(request.POST.get("heldout_share", "")),
            seed=whole(request.POST.get("seed") or "0"),
        )
        intake.ask_for_save(found, choices, leave_out=request.POST.get("leave_out") == "on")
    except UserError as error:
        if error.status != 400:
            raise
        return render(request, "datasets/_upload.html", {**page_values(found), "error": error})
    return render(request, "datasets/_upload.html", page_values(found))


def whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise UserError(f"The seed is {text[:20]!r}; it must be a whole number.", field="seed")
    return int(text)


def share(text: str) -> float | None:
    """Per cent as a share; None for an empty field."""
    if not text.strip():
        return None
    try:
        return float(text) / 100
    except ValueError as error:
        words = f"The held-out share is {text[:20]!r}; it must be a number of per cent."
        raise UserError(words, field="heldout_share") from error


@require_POST
def remap(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """Back to the mapping: another reading of the same files becomes a new version."""
    found = get_changeable(Upload, request.user, upload_id)
    intake.form_of(found)
    intake.put_back(found)
    return redirect("upload", upload_id)


@require_POST
def forget(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    forget_upload(request.user, get_visible(Upload, request.user, upload_id))
    return redirect("datasets")
