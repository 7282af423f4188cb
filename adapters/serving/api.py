"""Deployments in the API: what their page can do."""

from datetime import datetime
from typing import Any

from django.http import HttpResponse
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from adapters.models import AdapterVersion, Deployment, DeploymentChange
from adapters.serving import services, usage
from adapters.serving.services import Answering
from adapters.serving.views import named
from training.people.paging import Paged
from training.people.requests import SignedIn
from training.people.visible import get_visible

router = Router(tags=["deployments"])


class AnsweringIn(Schema):
    model_config = ConfigDict(extra="forbid")
    version: int
    other: int | None = None
    share: int = Field(0, ge=0, le=99, description="Per cent of the traffic that `other` answers.")
    merge: bool = Field(True, description="Answer merged into the base where the method allows it.")


class DeployIn(AnsweringIn):
    name: str = Field(max_length=63)


class RatesOut(Schema):
    requests: int
    failures: int
    requests_per_second: float
    median_seconds: float | None
    p95_seconds: float | None
    first_seconds: float | None
    tokens_per_second: float | None


class DeploymentOut(Schema):
    name: str
    owner: str
    version: int
    other: int | None
    share: int
    merge: bool
    created_at: datetime

    @staticmethod
    def resolve_owner(row: Deployment) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_version(row: Deployment) -> int:
        return row.version_id

    @staticmethod
    def resolve_other(row: Deployment) -> int | None:
        return row.other_id


class DeploymentWithRatesOut(DeploymentOut):
    last_five_minutes: RatesOut

    @staticmethod
    def resolve_last_five_minutes(row: Deployment) -> dict[str, Any]:
        return usage.rates(row)


class ChangeOut(Schema):
    at: datetime
    by: str
    words: str
    version: int | None
    label: str
    other: int | None
    other_label: str
    share: int
    merge: bool

    @staticmethod
    def resolve_by(row: DeploymentChange) -> str:
        return str(row.by.username) if row.by else ""

    @staticmethod
    def resolve_version(row: DeploymentChange) -> int | None:
        return row.version_id

    @staticmethod
    def resolve_other(row: DeploymentChange) -> int | None:
        return row.other_id


def answering(request: SignedIn, body: AnsweringIn) -> Answering:
    version, other = (
        get_visible(AdapterVersion, request.user, pk, "base_model", "team")
        if pk is not None
        else None
        for pk in (body.version, body.other)
    )
    assert version is not None
    return Answering(version, other, body.share, body.merge)


@router.get("", response=list[DeploymentOut])
@paginate(Paged)
def list_deployments(request: SignedIn) -> Any:
    return Deployment.objects.visible_to(request.user).select_related("owner")


@router.post("", response={201: DeploymentOut})
def create_deployment(request: SignedIn, body: DeployIn) -> Any:
    return 201, services.deploy(request.user, body.name, answering(request, body))


@router.get("/{slug:name}", response=DeploymentWithRatesOut)
def read_deployment(request: SignedIn, name: str) -> Deployment:
    return named(request, name)


@router.get("/{slug:name}/history", response=list[ChangeOut])
@paginate(Paged)
def read_history(request: SignedIn, name: str) -> Any:
    return named(request, name).changes.select_related("by")


@router.post("/{slug:name}/switch", response=DeploymentOut)
def switch_deployment(request: SignedIn, name: str, body: AnsweringIn) -> Deployment:
    """Other versions answer from the next request on; what is being answered is answered to its
    end.
    """
    return services.switch(request.user, named(request, name), answering(request, body))


@router.post("/{slug:name}/roll-back", response=DeploymentOut)
def roll_back_deployment(request: SignedIn, name: str) -> Deployment:
    """Back to what answered before the last change."""
    return services.roll_back(request.user, named(request, name))


@router.delete("/{slug:name}", response={204: None})
def delete_deployment(request: SignedIn, name: str, confirm: str) -> HttpResponse:
    """Take it down; `confirm` is its name once more. Its versions stay."""
    services.take_down(request.user, named(request, name), confirm)
    return HttpResponse(status=204)
