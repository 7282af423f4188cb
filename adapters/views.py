"""Pages: the adapter list and an adapter's page with its playground and download."""

from __future__ import annotations

from typing import Any

from django.db.models import Q
from django.http import HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST, require_safe

from adapters.evaluation import votes
from adapters.export.views import get_export_context
from adapters.models import AdapterVersion, Deployment, file_stem
from adapters.registry import actions
from adapters.registry.services import stream_zip
from adapters.serving import playground
from training.datasets.permissions import find_visible_version
from training.datasets.preview import get_random_prompt
from training.errors import NotFound, UserError, to_one_line
from training.people.pagination import paginate
from training.people.permissions import get_visible
from training.people.requests import AuthenticatedRequest, async_chunks
from training.runs.metrics.comparison import flatten_dict
from training.text_input import parse_json

MAX_BODY_BYTES = 200_000
VERSIONS_PER_PAGE = 100
SIBLINGS = 20
LINEAGE_PER_PAGE = 60
DEPLOYMENTS_PER_PAGE = 20
SWITCHES_PER_PAGE = 12


@require_safe
def list_adapters(request: AuthenticatedRequest) -> HttpResponse:
    """List versions by base model, newest first; `?q=` searches names and tags."""
    rows = AdapterVersion.objects.visible_to(request.user).select_related(
        "base_model", "run", "owner"
    )
    query = to_one_line(request.GET.get("q", ""))[:80]
    if query:
        rows = rows.filter(Q(name__icontains=query) | Q(tags__icontains=query))
    page = paginate(request, rows, VERSIONS_PER_PAGE)
    page_ids = {row.pk for row in page}
    page_deployments = Deployment.objects.filter(Q(version__in=page_ids) | Q(canary__in=page_ids))
    deployed = {row.version_id for row in page_deployments} | {
        row.canary_id for row in page_deployments
    }
    return render(
        request, "adapters/adapters.html", {"page": page, "q": query, "deployed": deployed}
    )


@require_safe
def show_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    version = get_visible(
        AdapterVersion,
        request.user,
        adapter_id,
        "base_model",
        "run",
        "data__dataset",
        "owner",
        "team",
        "parent",
    )
    can_change = AdapterVersion.objects.changeable_by(request.user).filter(pk=version.pk).exists()
    changeable_deployments = (
        Deployment.objects.changeable_by(request.user)
        .exclude(version=version)
        .select_related("version")
    )
    siblings = AdapterVersion.objects.visible_to(request.user).filter(
        owner=version.owner, name=version.name
    )
    values = {
        "adapter": version,
        "can_change": can_change,
        "lineage": paginate(
            request, actions.build_lineage(request.user, version), LINEAGE_PER_PAGE, "lineage"
        ),
        "siblings": list(siblings.order_by("-number")[:SIBLINGS])[::-1],
        "sibling_count": siblings.count(),
        "deployed_as": paginate(
            request, actions.find_deployments(version), DEPLOYMENTS_PER_PAGE, "deployed"
        ),
        "deployments": paginate(request, changeable_deployments, SWITCHES_PER_PAGE, "deployments"),
        "votes": votes.get_overall_win_rate(version),
        "settings": flatten_dict(version.provenance.get("settings", {})),
        "suggested": actions.SUGGESTED_TAGS,
        **get_export_context(request, version),
    }
    return render(request, "adapters/adapter.html", values)


@require_safe
def download_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id)
    response = StreamingHttpResponse(
        async_chunks(stream_zip(version)), content_type="application/zip"
    )
    response["Content-Disposition"] = f'attachment; filename="{file_stem(version)}.zip"'
    return response


@require_safe
def show_held_out_prompt(request: AuthenticatedRequest, adapter_id: int) -> HttpResponse:
    return JsonResponse(get_held_out_prompt(request, adapter_id))


def get_held_out_prompt(request: AuthenticatedRequest, adapter_id: int) -> dict[str, Any]:
    """A random held-out prompt of the adapter's data, with its expected answer."""
    version = get_visible(AdapterVersion, request.user, adapter_id)
    data = find_visible_version(request.user, version.data_id) if version.data_id else None
    row = get_random_prompt(data) if data else None
    if row is None:
        raise NotFound("The data of this adapter was deleted or is not shared with you.")
    return row


@require_POST
def try_adapter(request: AuthenticatedRequest, adapter_id: int) -> HttpResponseBase:
    """Stream the reply to the conversation in the request body as server-sent events."""
    if request.content_type != "application/json":  # Django has read the body of a form
        raise UserError("Send the conversation as application/json.", code="not_json")
    if len(request.body) > MAX_BODY_BYTES:
        raise UserError(f"The request body exceeds {MAX_BODY_BYTES:,} bytes.")
    body = parse_json(request.body, "The request")
    if not isinstance(body, dict):
        raise UserError("The request body must be a JSON object.")
    return stream_playground(request, adapter_id, body)


def stream_playground(
    request: AuthenticatedRequest, adapter_id: int, body: dict[str, Any]
) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    response = StreamingHttpResponse(
        playground.stream_answer(playground.build_request(request.user, version, body)),
        content_type="text/event-stream",
    )
    response["Cache-Control"] = "no-store"
    response["X-Accel-Buffering"] = "no"
    return response
