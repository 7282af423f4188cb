"""What a version is exported as: its merged model, GGUF files; their progress, and their
downloads.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from adapters.export import gguf as export_gguf
from adapters.export import hub
from adapters.export import merge as export_merge
from adapters.models import AdapterVersion, file_stem
from training.jobs.services import jobs_about
from training.people.requests import SignedIn, in_pieces
from training.people.visible import get_changeable, get_visible


def exported(request: SignedIn, adapter_id: int) -> HttpResponse:
    """The card of exports anew, while something is made."""
    found = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    mine = AdapterVersion.objects.changeable_by(request.user).filter(pk=found.pk).exists()
    return render(
        request, "adapters/_exports.html", {"adapter": found, "mine": mine, **export_values(found)}
    )


def export_values(version: AdapterVersion) -> dict[str, Any]:
    kinds = (export_merge.KIND, export_gguf.KIND, hub.KIND)
    jobs = list(jobs_about(version).filter(kind__in=kinds))
    merge = next((job for job in jobs if job.kind == export_merge.KIND), None)
    return {
        "merge": merge,
        "merged": version.whole_model or export_merge.is_merged(version),
        "ggufs": [
            (job, job.params["quantisation"]) for job in jobs if job.kind == export_gguf.KIND
        ],
        "pushes": [job for job in jobs if job.kind == hub.KIND],
        "quantisations": export_gguf.QUANTISATIONS,
        "making": any(job.is_open for job in jobs),
    }


@require_POST
def merge(request: SignedIn, adapter_id: int) -> HttpResponse:
    export_merge.merge_version(
        request.user, get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    )
    return redirect("adapter", adapter_id)


@require_POST
def gguf(request: SignedIn, adapter_id: int) -> HttpResponse:
    found = get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    export_gguf.export_gguf(request.user, found, request.POST.get("quantisation", ""))
    return redirect("adapter", adapter_id)


@require_POST
def push(request: SignedIn, adapter_id: int) -> HttpResponse:
    found = get_changeable(AdapterVersion, request.user, adapter_id, "base_model")
    said = {name: request.POST.get(name, "").strip() for name in ("repository", "token", "what")}
    hub.push(request.user, found, **said, private="private" in request.POST)
    return redirect("adapter", adapter_id)


def download_merged(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    found = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    export_gguf.model_folder(found)
    answer = StreamingHttpResponse(
        in_pieces(export_gguf.merged_zip(found)), content_type="application/zip"
    )
    answer["Content-Disposition"] = f'attachment; filename="{file_stem(found)}-merged.zip"'
    return answer


def download_gguf(request: SignedIn, adapter_id: int, quantisation: str) -> HttpResponseBase:
    found = get_visible(AdapterVersion, request.user, adapter_id)
    path = export_gguf.made_gguf(found, quantisation)
    answer = StreamingHttpResponse(
        in_pieces(export_gguf.pieces_of(path)), content_type="application/octet-stream"
    )
    answer["Content-Length"] = str(path.stat().st_size)
    answer["Content-Disposition"] = f'attachment; filename="{file_stem(found)}-{quantisation}.gguf"'
    return answer
