"""The shelf, an adapter's page with "Try it", and its download."""

from __future__ import annotations

import json
from typing import Any

from django.core.paginator import Paginator
from django.db.models import Q
from django.http import HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from adapters.evaluation import votes
from adapters.export.views import export_values
from adapters.models import AdapterVersion, Deployment, file_stem
from adapters.registry import actions
from adapters.registry.services import zip_stream
from adapters.serving import playground
from training.datasets.preview import random_row
from training.datasets.visible import visible_data
from training.errors import NotFound, UserError, one_line
from training.people.requests import SignedIn, in_pieces
from training.people.visible import get_visible
from training.runs.metrics.comparison import flat

MAX_BODY_BYTES = 200_000
VERSIONS_A_PAGE = 100
MOST_SWITCHES = 12  # deployments that a version's page offers to switch; all are on their own page


def adapters(request: SignedIn) -> HttpResponse:
    """Newest versions first within a base; `?q=` looks into names and tags."""
    rows = AdapterVersion.objects.visible_to(request.user).select_related(
        "base_model", "run", "owner"
    )
    words = one_line(request.GET.get("q", ""))[:80]
    if words:
        rows = rows.filter(Q(name__icontains=words) | Q(tags__icontains=words))
    page = Paginator(rows, VERSIONS_A_PAGE).get_page(request.GET.get("page"))
    shown = {row.pk for row in page}
    used = Deployment.objects.filter(Q(version__in=shown) | Q(other__in=shown))
    deployed = {row.version_id for row in used} | {row.other_id for row in used}
    return render(
        request, "adapters/adapters.html", {"page": page, "q": words, "deployed": deployed}
    )


def adapter(request: SignedIn, adapter_id: int) -> HttpResponse:
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
    mine = AdapterVersion.objects.changeable_by(request.user).filter(pk=version.pk).exists()
    others = Deployment.objects.changeable_by(request.user).select_related("version", "other")[
        :MOST_SWITCHES
    ]
    siblings = AdapterVersion.objects.visible_to(request.user).filter(
        owner=version.owner, name=version.name
    )
    values = {
        "adapter": version,
        "mine": mine,
        "lineage": actions.lineage(request.user, version),
        "siblings": siblings.order_by("number"),
        "answers_as": actions.answered_by(version),
        "deployments": others,
        "votes": votes.total(version),
        "settings": flat(version.record.get("settings", {})),
        "suggested": actions.SUGGESTED_TAGS,
        **export_values(version),
    }
    return render(request, "adapters/adapter.html", values)


def download(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id)
    answer = StreamingHttpResponse(in_pieces(zip_stream(version)), content_type="application/zip")
    answer["Content-Disposition"] = f'attachment; filename="{file_stem(version)}.zip"'
    return answer


def heldout(request: SignedIn, adapter_id: int) -> HttpResponse:
    return JsonResponse(heldout_row(request, adapter_id))


def heldout_row(request: SignedIn, adapter_id: int) -> dict[str, Any]:
    """A prompt that this adapter was not trained on, and what is expected of it."""
    version = get_visible(AdapterVersion, request.user, adapter_id)
    data = visible_data(request.user, version.data_id) if version.data_id else None
    row = random_row(data) if data else None
    if row is None:
        raise NotFound("The data of this adapter is gone, or not shared with you.")
    return row


@require_POST
def try_it(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    """Stream the answer of base or adapter to the conversation in the body, as server-sent
    events.
    """
    if len(request.body) > MAX_BODY_BYTES:
        raise UserError(f"The request has more than {MAX_BODY_BYTES:,} bytes.")
    try:
        body = json.loads(request.body)
    except ValueError as error:
        raise UserError(f"The request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("The request must be a JSON object.")
    return stream_answer(request, adapter_id, body)


def stream_answer(request: SignedIn, adapter_id: int, body: dict[str, Any]) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id, "base_model")
    answer = StreamingHttpResponse(
        playground.answer(playground.question(version, body)), content_type="text/event-stream"
    )
    answer["Cache-Control"] = "no-store"
    answer["X-Accel-Buffering"] = "no"
    return answer
