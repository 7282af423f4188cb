"""Data sets in the API."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ninja import Router, Schema

from training.datasets.models import Dataset
from training.people.requests import SignedIn
from training.people.visible import get_visible

router = Router(tags=["datasets"])


class VersionOut(Schema):
    id: int
    number: int
    digest: str
    rows: int
    train_rows: int
    heldout_rows: int
    test_rows: int
    left_out: int


class DatasetOut(Schema):
    id: int
    name: str
    source: str
    licence: str
    owner: str
    created_at: datetime
    versions: list[VersionOut]

    @staticmethod
    def resolve_owner(row: Dataset) -> str:
        return str(row.owner.username)


@router.get("", response=list[DatasetOut])
def list_datasets(request: SignedIn) -> Any:
    return Dataset.objects.visible_to(request.user).select_related("owner").prefetch_related("versions")


@router.get("/{int:dataset_id}", response=DatasetOut)
def read_dataset(request: SignedIn, dataset_id: int) -> Dataset:
    return get_visible(Dataset, request.user, dataset_id, "owner")
