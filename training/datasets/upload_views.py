"""Views for uploading data: upload or paste rows, map the columns, check the file, review the
report, save a version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from training.datasets import uploads
from training.datasets.build import BuildOptions
from training.datasets.column_mapping import (
    PART_QUESTIONS,
    ROW_FORMAT_PARTS,
    ROW_FORMATS,
    ColumnMapping,
)
from training.datasets.formats import DELIMITERS, UNITS
from training.datasets.models import Dataset, Upload, UploadState
from training.datasets.preview import list_unused_columns, preview_rows
from training.datasets.services import discard_upload
from training.datasets.upload_handler import format_upload_limit, save_pasted_rows, was_too_large
from training.datasets.uploads import NamedFile
from training.errors import TooLarge, UserError
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero

MAX_LISTED_COLUMNS = 200


@require_http_methods(["GET", "HEAD", "POST"])
def new_dataset(request: AuthenticatedRequest) -> HttpResponseBase:
    """`?dataset=ID` adds a version to an existing dataset."""
    dataset_id = parse_int_or_zero(request.POST.get("dataset") or request.GET.get("dataset") or "")
    dataset = get_changeable(Dataset, request.user, dataset_id) if dataset_id else None
    values: dict[str, Any] = {
        "limit": format_upload_limit(),
        "limit_bytes": settings.DATASET_MAX_BYTES,
        "dataset": dataset,
    }
    if request.method != "POST":
        return render(request, "datasets/new.html", values)
    is_json_request = "application/json" in request.headers.get("Accept", "")
    try:
        upload = create_upload(request, dataset)
    except UserError as error:
        if is_json_request:
            raise
        form_values = {name: request.POST.get(name, "") for name in ("name", "rows", "hub_id")}
        return render(
            request,
            "datasets/new.html",
            {**values, "error": error, "form_values": form_values},
            status=error.status,
        )
    url = reverse("upload", args=[upload.pk])
    return JsonResponse({"url": url}) if is_json_request else redirect(url)


def create_upload(request: AuthenticatedRequest, dataset: Dataset | None) -> Upload:
    if was_too_large(request):
        raise TooLarge(
            f"The upload is larger than {format_upload_limit()}. Nothing was saved.",
            field="file",
        )
    name = request.POST.get("name", "").strip()
    if hub_id := request.POST.get("hub_id", "").strip():
        return uploads.enqueue_hub_fetch(request.user, hub_id, name=name, dataset=dataset)
    rows = request.POST.get("rows", "")
    files = [
        to_named_file(request.FILES.get("file"), ""),
        to_named_file(request.FILES.get("eval_file"), "eval"),
    ]
    received_files = [file for file in files if file is not None]
    if files[0] is None and rows.strip():
        received_files = [save_pasted_rows(rows), *received_files]
        return uploads.receive_files(
            request.user,
            received_files,
            name=name or "Pasted rows",
            source="pasted",
            dataset=dataset,
        )
    if files[0] is None:
        raise UserError("Choose a file, paste rows, or enter a Hugging Face dataset.", field="file")
    return uploads.receive_files(
        request.user,
        received_files,
        name=name,
        source=f"upload: {received_files[0][1]}",
        dataset=dataset,
    )


def to_named_file(file: Any, split: str) -> NamedFile | None:
    if file is None:
        return None
    return Path(file.temporary_file_path()), str(file.name), split


@require_safe
def show_upload(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """One page for all steps; its content depends on the state of the upload."""
    upload = get_visible(Upload, request.user, upload_id, "dataset", "owner")
    fragment = request.headers.get("HX-Request") and request.headers.get("HX-Target") == "upload"
    return render(
        request,
        "datasets/_upload.html" if fragment else "datasets/upload.html",
        build_page_context(upload),
    )


def build_page_context(upload: Upload) -> dict[str, Any]:
    values: dict[str, Any] = {
        "upload": upload,
        "is_busy": upload.state in uploads.BUSY_STATES,
        "versions": upload.versions.all(),
        "new_upload_url": f"{reverse('dataset-new')}?dataset={upload.dataset_id or ''}",
    }
    if upload.state in (UploadState.DRAFT, UploadState.FAILED) and upload.mapping:
        values |= build_mapping_context(upload, ColumnMapping(**upload.mapping))
    elif upload.state == UploadState.CHECKED:
        report = upload.report
        values |= {
            "mapping": ColumnMapping(**upload.mapping),
            "unused": describe_unused(report["unused"]),
            "unused_of": f"{report['rows'] + report['problems']['count']:,} rows",
        }
    return values


def build_mapping_context(upload: Upload, mapping: ColumnMapping) -> dict[str, Any]:
    file_format = uploads.get_file_format(upload)
    rows = preview_rows(upload, mapping) if mapping.is_complete else []
    unused = list_unused_columns(upload, mapping) if mapping.is_complete else []
    return {
        "file_format": file_format,
        "delimiters": DELIMITERS.items(),
        "units": UNITS.items(),
        "row_formats": ROW_FORMATS.items(),
        "mapping": mapping,
        "columns": uploads.list_column_names(upload)[:MAX_LISTED_COLUMNS],
        "parts": [
            (part, needed, mapping.columns.get(part, ""))
            for part, needed in ROW_FORMAT_PARTS[mapping.row_format]
        ],
        "rows": rows,
        "unused": describe_unused(unused),
        "unused_of": f"the first {len(uploads.load_sample(upload)):,} rows",
    }


def describe_unused(unused: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that are not used, those first that the user may want to use."""
    columns = [{**column, "question": PART_QUESTIONS.get(column["part"], "")} for column in unused]
    return sorted(columns, key=lambda column: not column["question"])


def parse_mapping_form(request: AuthenticatedRequest, upload: Upload) -> dict[str, Any]:
    row_format = request.POST.get("row_format", "")
    has_new_format = row_format != upload.mapping.get("row_format")
    columns = {
        part: request.POST.get(f"column-{part}", "")
        for part, _ in ROW_FORMAT_PARTS.get(row_format, ())
    }
    if has_new_format:  # other parts: map columns of the same name
        names = uploads.list_column_names(upload)
        columns = {part: columns.get(part) or (part if part in names else "") for part in columns}
    part, _, column = request.POST.get("use", "").partition("=")  # "Use it as ...?"
    if part in columns:
        columns[part] = column
    return {"row_format": row_format, "columns": columns, "split": request.POST.get("split", "")}


def parse_read_options(request: AuthenticatedRequest) -> dict[str, Any]:
    options: dict[str, Any] = {
        name: request.POST[name] for name in ("delimiter", "unit") if name in request.POST
    }
    return options | ({"header": "header" in request.POST} if "has_header" in request.POST else {})


def has_new_read_options(request: AuthenticatedRequest, upload: Upload) -> bool:
    """True if the form changes how the file is read, and not only the mapping."""
    current = uploads.get_file_format(upload).to_dict()
    return any(current[name] != value for name, value in parse_read_options(request).items())


@require_POST
def map_columns(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """Save a change of the mapping and return the new preview. With `check`, also enqueue the check
    of the whole file.
    """
    upload = get_changeable(Upload, request.user, upload_id, "dataset", "owner")
    values = parse_mapping_form(request, upload)
    try:
        if has_new_read_options(request, upload):
            uploads.set_read_options(upload, parse_read_options(request))
        else:
            uploads.set_mapping(upload, values)
            if request.POST.get("check"):
                uploads.request_check(upload)
    except UserError as error:
        if error.status != 400 or values["row_format"] not in ROW_FORMATS:
            raise
        mapping = ColumnMapping(
            values["row_format"], {k: v for k, v in values["columns"].items() if v}, values["split"]
        )
        context = (
            build_page_context(upload) | build_mapping_context(upload, mapping) | {"error": error}
        )
        return render(request, "datasets/_upload.html", context)
    return render(request, "datasets/_upload.html", build_page_context(upload))


@require_POST
def save_upload(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    upload = get_changeable(Upload, request.user, upload_id, "dataset", "owner")
    try:
        choices = BuildOptions(
            drop_duplicates=request.POST.get("drop_duplicates") == "on",
            drop_near_duplicates=request.POST.get("drop_near_duplicates") == "on",
            eval_share=parse_eval_share(request.POST.get("eval_share", "")),
            seed=parse_seed(request.POST.get("seed") or "0"),
        )
        uploads.request_save(upload, choices, skip_faulty=request.POST.get("skip_faulty") == "on")
    except UserError as error:
        if error.status != 400:
            raise
        return render(
            request, "datasets/_upload.html", {**build_page_context(upload), "error": error}
        )
    return render(request, "datasets/_upload.html", build_page_context(upload))


def parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise UserError(f"The seed is {text[:20]!r}; it must be an integer.", field="seed")
    return int(text)


def parse_eval_share(text: str) -> float | None:
    """Percent as a fraction; None for an empty field."""
    if not text.strip():
        return None
    try:
        return float(text) / 100
    except ValueError as error:
        message = f"The held-out share is {text[:20]!r}; it must be a percentage."
        raise UserError(message, field="eval_share") from error


@require_POST
def reset_mapping(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    """Back to the mapping, to save the same files as another version."""
    upload = get_changeable(Upload, request.user, upload_id)
    uploads.get_file_format(upload)
    uploads.reset_to_mapping(upload)
    return redirect("upload", upload_id)


@require_POST
def delete_upload(request: AuthenticatedRequest, upload_id: int) -> HttpResponse:
    discard_upload(request.user, get_visible(Upload, request.user, upload_id))
    return redirect("datasets")
