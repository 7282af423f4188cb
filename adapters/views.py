"""The shelf, an adapter's page with "Try it", and its download."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from adapters import ask
from adapters.models import AdapterVersion
from adapters.shelf import file_stem, zip_stream
from training.datasets.preview import random_row
from training.datasets.visible import visible_data
from training.errors import NotFound, UserError
from training.people.requests import SignedIn, in_pieces
from training.people.visible import get_visible

MAX_BODY_BYTES = 200_000


def adapters(request: SignedIn) -> HttpResponse:
    rows = AdapterVersion.objects.visible_to(request.user).select_related("base_model", "run", "owner")
    return render(request, "adapters/adapters.html", {"adapters": rows})


def adapter(request: SignedIn, adapter_id: int) -> HttpResponse:
    version = get_visible(AdapterVersion, request.user, adapter_id, "base_model", "run__data__dataset", "owner")
    return render(request, "adapters/adapter.html", {"adapter": version})


def download(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    version = get_visible(AdapterVersion, request.user, adapter_id)
    answer = StreamingHttpResponse(in_pieces(zip_stream(version)), content_type="application/zip")
    answer["Content-Disposition"] = f'attachment; filename="{file_stem(version)}.zip"'
    return answer


def heldout(request: SignedIn, adapter_id: int) -> HttpResponse:
    return JsonResponse(heldout_row(request, adapter_id))


def heldout_row(request: SignedIn, adapter_id: int) -> dict[str, Any]:
    """A prompt that this adapter was not trained on, and what is expected of it."""
    version = get_visible(AdapterVersion, request.user, adapter_id, "run__data")
    data = visible_data(request.user, version.run.data_id) if version.run else None
    row = random_row(data) if data else None
    if row is None:
        raise NotFound("The data of this adapter's run is gone, or not shared with you.")
    return row


@require_POST
def try_it(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    """Stream the answer of base or adapter to the conversation in the body, as server-sent events."""
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
    answer = StreamingHttpResponse(ask.answer(ask.question(version, body)), content_type="text/event-stream")
    answer["Cache-Control"] = "no-store"
    answer["X-Accel-Buffering"] = "no"
    return answer
