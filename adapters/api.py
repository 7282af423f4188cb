"""Adapters in the API: list, read, download."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.http import HttpResponseBase
from ninja import Router, Schema

from adapters import views
from adapters.models import AdapterVersion
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


@router.get("", response=list[AdapterOut])
def list_adapters(request: SignedIn) -> Any:
    return AdapterVersion.objects.visible_to(request.user).select_related("owner", "base_model")


@router.get("/{int:adapter_id}", response=AdapterOut)
def read_adapter(request: SignedIn, adapter_id: int) -> AdapterVersion:
    return get_visible(AdapterVersion, request.user, adapter_id, "owner", "base_model")


@router.get("/{int:adapter_id}/download")
def download_adapter(request: SignedIn, adapter_id: int) -> HttpResponseBase:
    """A zip of `adapter_model.safetensors` and `adapter_config.json`, as plain PEFT loads them."""
    return views.download(request, adapter_id)
