"""The exports of a version: merged model, GGUF files and pushes, with progress and downloads."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from adapters.export import gguf as export_gguf
from adapters.export import hub
from adapters.export import merge as export_merge
from adapters.models import AdapterVersion, file_stem
from training.jobs.models import OPEN_STATES
from training.jobs.services import find_jobs_about
from training.people.pagination import paginate
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, async_chunks

PUSHES_PER_PAGE = 20


@require_safe
def show_exports(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    """The export card, which the page reloads while an export runs."""
    version = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    can_change = AdapterVersion.objects.changeable_by(request.user).filter(pk=version.pk).exists()
    return render(
        request,
        "adapters/_exports.html",
        {"adapter": version, "can_change": can_change, **get_export_context(request, version)},
    )


def get_export_context(request: AuthenticatedRequest, version: AdapterVersion) -> dict[str, Any]:
    jobs = list(find_jobs_about(version).filter(kind__in=(export_merge.KIND, export_gguf.KIND)))
    pushes = find_jobs_about(version).filter(kind=hub.KIND).order_by("-pk")
    is_exporting = any(job.is_open for job in jobs) or pushes.filter(state__in=OPEN_STATES).exists()
    exports_url = f"{reverse('adapter-exports', args=[version.pk])}?{request.GET.urlencode()}"
    merge = next((job for job in jobs if job.kind == export_merge.KIND), None)
    return {
        "merge": merge,
        "merged": version.is_full_model or export_merge.is_merged(version),
        "ggufs": [
            (job, job.params["quantization"]) for job in jobs if job.kind == export_gguf.KIND
        ],
        "pushes": paginate(request, pushes, PUSHES_PER_PAGE, "pushes"),
        "quantizations": export_gguf.QUANTIZATIONS,
        "poll_address": exports_url if is_exporting else "",
    }


@require_POST
def merge_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    export_merge.merge_version(
        request.user, get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    )
    return redirect("adapter", adapter_id)


@require_POST
def export_gguf_file(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    version = get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    export_gguf.export_gguf(request.user, version, request.POST.get("quantization", ""))
    return redirect("adapter", adapter_id)


@require_POST
def push_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    version = get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    form = {name: request.POST.get(name, "").strip() for name in ("repository", "token", "what")}
    hub.push_to_hub(request.user, version, **form, private="private" in request.POST)
    return redirect("adapter", adapter_id)


@require_safe
def download_merged(request: AuthenticatedRequest, adapter_id: int) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    export_gguf.get_model_folder(version)
    response = StreamingHttpResponse(
        async_chunks(export_gguf.stream_merged_zip(version)), content_type="application/zip"
    )
    response["Content-Disposition"] = f'attachment; filename="{file_stem(version)}-merged.zip"'
    return response


@require_safe
def download_gguf(
    request: AuthenticatedRequest, adapter_id: int, quantization: str
) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id)
    path = export_gguf.get_gguf(version, quantization)
    response = StreamingHttpResponse(
        async_chunks(export_gguf.iter_file_chunks(path)), content_type="application/octet-stream"
    )
    response["Content-Length"] = str(path.stat().st_size)
    response["Content-Disposition"] = (
        f'attachment; filename="{file_stem(version)}-{quantization}.gguf"'
    )
    return response
