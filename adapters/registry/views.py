"""Pages and forms for adapter versions: edit, delete, continue training, register a checkpoint,
import.
"""

from __future__ import annotations

import math

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from adapters.models import AdapterVersion
from adapters.registry import actions, continue_training, imports, services
from adapters.registry.import_checks import MAX_BYTES
from training.catalog.models import BaseModel
from training.catalog.option_sources import READY_MODELS
from training.datasets.permissions import get_visible_version
from training.errors import UserError
from training.formatting import format_bytes
from training.people.options import list_options
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.models import Run

# On the page; the API accepts any setting
CHANGEABLE_SETTINGS = ("learning_rate", "epochs", "max_steps")


@require_POST
def edit_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    version = get_changeable(AdapterVersion, request.user, adapter_id)
    actions.update_version(
        request.user,
        version,
        tags=request.POST.get("tags", ""),
        notes=request.POST.get("notes", ""),
    )
    return redirect("adapter", adapter_id)


@require_POST
def delete_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    version = get_changeable(AdapterVersion, request.user, adapter_id)
    freed = actions.delete_version(request.user, version, request.POST.get("name", ""))
    messages.success(request, f"{version} was deleted, which freed {format_bytes(freed)}.")
    return redirect("adapters")


@require_POST
def continue_from(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    """Start a run from this version's weights. Empty fields keep the version's settings."""
    version = get_visible(
        AdapterVersion, request.user, adapter_id, "base_model", "data__dataset__team"
    )
    changes = {
        name: parse_finite(text)
        for name in CHANGEABLE_SETTINGS
        if (text := request.POST.get(name, "").strip())
    }
    typed_changes = {
        name: int(value) if name != "learning_rate" else value for name, value in changes.items()
    }
    data = None
    if data_id := parse_int_or_zero(request.POST.get("data", "")):
        data = get_visible_version(request.user, data_id)
    run = continue_training.continue_from(request.user, version, data=data, changes=typed_changes)
    return redirect("run", run.pk)


def parse_finite(text: str) -> float:
    """Raises UserError if the text is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text[:40]!r} is not a number.")
    return value


@require_POST
def register_checkpoint(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "owner", "team", "base_model", "data__dataset")
    version = services.register_checkpoint(
        request.user, run, parse_int_or_zero(request.POST.get("step", ""))
    )
    messages.success(
        request, f"The checkpoint of step {version.step:,} was registered as {version}."
    )
    return redirect("adapter", version.pk)


@require_http_methods(["GET", "HEAD", "POST"])
def import_adapter(request: AuthenticatedRequest) -> HttpResponse:
    values = {
        "bases": list_options(request.user, READY_MODELS, request.POST.get("base", "")),
        "max_bytes": MAX_BYTES,
    }
    if request.method != "POST":
        return render(request, "adapters/import.html", values)
    try:
        version = import_from_form(request)
    except UserError as error:
        form_values = {"name": request.POST.get("name", "")}
        return render(
            request,
            "adapters/import.html",
            {**values, "error": error, "form_values": form_values},
            status=error.status,
        )
    messages.success(request, f"{version} was imported.")
    return redirect("adapter", version.pk)


def import_from_form(request: AuthenticatedRequest) -> AdapterVersion:
    uploads = request.FILES.getlist("file")
    if not uploads:
        raise UserError("Choose a zip, or the two files of the adapter.", field="file")
    base = BaseModel.objects.filter(pk=parse_int_or_zero(request.POST.get("base", ""))).first()
    if base is None:
        raise UserError("Choose the base model that the adapter was trained on.", field="base")
    return imports.import_version(request.user, uploads, base, request.POST.get("name", ""))
