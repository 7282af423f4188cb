"""Adapters in the API: list, read, download."""

from datetime import datetime
from typing import Any, Literal

from django.http import HttpResponseBase
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from adapters import views
from adapters.models import AdapterVersion
from training.people.paging import Paged
from training.people.requests import SignedIn
from training.people.visible import get_visible

router = Router(tags=["adapters"])
TRY: JsonDict = {"who": "adapter", "messages": [{"role": "user", "content": "turn on the kitchen lamp"}]}


class AdapterOut(Schema):
    id: int
    name: str
    number: int
    owner: str
    base_model: str
    run: int | None
    method: str
    step: int
    heldout_loss: float | None
    exact_match: float | None
    trainable_parameters: int
    size_bytes: int
    files: dict[str, Any]
    created_at: datetime

    @staticmethod
    def resolve_owner(row: AdapterVersion) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_base_model(row: AdapterVersion) -> str:
        return row.base_model.name

    @staticmethod
    def resolve_run(row: AdapterVersion) -> int | None:
        return row.run_id


STREAM: dict[str, Any] = {"responses": {200: {"content": {"text/event-stream": {}}}}}


class TryIn(Schema):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [TRY]})
    who: Literal["base", "adapter"]
    messages: list[dict[str, str]] = Field(min_length=1, max_length=100)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0.01, le=1)
    max_tokens: int = Field(200, ge=1, le=2048)


class HeldoutOut(Schema):
    messages: list[dict[str, str]]
    expected: str
    split: str


@router.get("", response=list[AdapterOut])
@paginate(Paged)
def list_adapters(request: SignedIn) -> Any:
    return AdapterVersion.objects.visible_to(request.user).select_related("owner", "base_model")


@router.get("/{int:adapter_id}", response=AdapterOut)
def read_adapter(request: SignedIn, adapter_id: int) -> AdapterVersion:
    return get_visible(AdapterVersion, request.user, adapter_id, "owner", "base_model")


@router.get("/{int:adapter_id}/heldout", response=HeldoutOut)
def read_heldout(request: SignedIn, adapter_id: int) -> Any:
    """A prompt that this adapter was not trained on, and what is expected of it."""
    return views.heldout_row(request, adapter_id)


@router.post("/{int:adapter_id}/try", openapi_extra=STREAM)
def try_adapter(request: SignedIn, adapter_id: int, body: TryIn) -> HttpResponseBase:
    """The answer of base or adapter to a conversation, as server-sent events in OpenAI's chunks."""
    return views.stream_answer(request, adapter_id, body.dict())


ZIP: dict[str, Any] = {"responses": {200: {"content": {"application/zip": {}}}}}


@router.get("/{int:adapter_id}/download", openapi_extra=ZIP)
def download_adapter(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    """A zip of `adapter_model.safetensors` and `adapter_config.json`, as plain PEFT loads them; or of the whole model."""
    return views.download(request, adapter_id)
