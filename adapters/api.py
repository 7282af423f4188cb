"""Adapters in the API: list, read, download."""

from datetime import datetime
from typing import Any

from django.http import HttpResponseBase
from ninja import Router, Schema
from ninja.pagination import paginate

from adapters import views
from adapters.models import AdapterVersion
from training.people.paging import Paged
from training.people.requests import SignedIn
from training.people.visible import get_visible

router = Router(tags=["adapters"])


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


ZIP: dict[str, Any] = {"responses": {200: {"content": {"application/zip": {}}}}}


@router.get("/{int:adapter_id}/download", openapi_extra=ZIP)
def download_adapter(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    """A zip of `adapter_model.safetensors` and `adapter_config.json`, as plain PEFT loads them."""
    return views.download(request, adapter_id)
