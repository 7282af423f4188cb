"""Base models in the API: read only; admins add them on the Models page."""

from __future__ import annotations

from typing import Any

from ninja import Router, Schema

from training.catalog.models import BaseModel
from training.errors import NotFound
from training.people.requests import SignedIn

router = Router(tags=["models"])


class ModelOut(Schema):
    id: int
    name: str
    source: str
    revision: str
    state: str
    progress: float
    error: str
    card: dict[str, Any]


@router.get("", response=list[ModelOut])
def list_models(request: SignedIn) -> Any:
    return BaseModel.objects.all()


@router.get("/{int:model_id}", response=ModelOut)
def read_model(request: SignedIn, model_id: int) -> BaseModel:
    model = BaseModel.objects.filter(pk=model_id).first()
    if model is None:
        raise NotFound(f"There is no base model {model_id}.")
    return model
