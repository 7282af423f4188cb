"""API for deployments."""

from datetime import datetime
from typing import Any

from django.http import HttpResponse
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from adapters.models import AdapterVersion, Deployment, DeploymentChange
from adapters.serving import services, usage
from adapters.serving.services import Routing
from adapters.serving.views import get_deployment
from training.people.pagination import Pagination
from training.people.permissions import get_visible
from training.people.requests import AuthenticatedRequest

router = Router(tags=["deployments"])


class RoutingIn(Schema):
    model_config = ConfigDict(extra="forbid")
    version: int
    canary: int | None = None
    canary_percent: int = Field(
        0, ge=0, le=99, description="Percentage of the traffic that goes to `canary`."
    )
    use_merged: bool = Field(
        True, description="Serve the merged model if the method supports merging."
    )


class DeploymentIn(RoutingIn):
    name: str = Field(max_length=63)


class RatesOut(Schema):
    requests: int
    failures: int
    requests_per_second: float
    median_seconds: float | None
    p95_seconds: float | None
    first_token_seconds: float | None
    tokens_per_second: float | None


class DeploymentOut(Schema):
    name: str
    owner: str
    version: int
    canary: int | None
    canary_percent: int
    use_merged: bool
    created_at: datetime

    @staticmethod
    def resolve_owner(row: Deployment) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_version(row: Deployment) -> int:
        return row.version_id

    @staticmethod
    def resolve_canary(row: Deployment) -> int | None:
        return row.canary_id


class DeploymentWithRatesOut(DeploymentOut):
    last_five_minutes: RatesOut

    @staticmethod
    def resolve_last_five_minutes(row: Deployment) -> dict[str, Any]:
        return usage.get_rates(row)


class ChangeOut(Schema):
    at: datetime
    by: str
    description: str
    version: int | None
    label: str
    canary: int | None
    canary_label: str
    canary_percent: int
    use_merged: bool

    @staticmethod
    def resolve_by(row: DeploymentChange) -> str:
        return str(row.by.username) if row.by else ""

    @staticmethod
    def resolve_version(row: DeploymentChange) -> int | None:
        return row.version_id

    @staticmethod
    def resolve_canary(row: DeploymentChange) -> int | None:
        return row.canary_id


def build_routing(request: AuthenticatedRequest, body: RoutingIn) -> Routing:
    version, canary = (
        get_visible(AdapterVersion, request.user, pk, "base_model", "team")
        if pk is not None
        else None
        for pk in (body.version, body.canary)
    )
    assert version is not None
    return Routing(version, canary, body.canary_percent, body.use_merged)


@router.get("", response=list[DeploymentOut])
@paginate(Pagination)
def list_deployments(request: AuthenticatedRequest) -> Any:
    return Deployment.objects.visible_to(request.user).select_related("owner")


@router.post("", response={201: DeploymentOut})
def create_deployment(request: AuthenticatedRequest, body: DeploymentIn) -> Any:
    return 201, services.create_deployment(request.user, body.name, build_routing(request, body))


@router.get("/{slug:name}", response=DeploymentWithRatesOut)
def read_deployment(request: AuthenticatedRequest, name: str) -> Deployment:
    return get_deployment(request, name)


@router.get("/{slug:name}/history", response=list[ChangeOut])
@paginate(Pagination)
def read_history(request: AuthenticatedRequest, name: str) -> Any:
    return get_deployment(request, name).changes.select_related("by")


@router.post("/{slug:name}/switch", response=DeploymentOut)
def switch_deployment(request: AuthenticatedRequest, name: str, body: RoutingIn) -> Deployment:
    """Switch to other versions. Applies to new requests; requests in progress finish unchanged."""
    return services.switch_deployment(
        request.user, get_deployment(request, name), build_routing(request, body)
    )


@router.post("/{slug:name}/roll-back", response=DeploymentOut)
def roll_back_deployment(request: AuthenticatedRequest, name: str) -> Deployment:
    """Roll back to what the deployment served before the last change."""
    return services.roll_back(request.user, get_deployment(request, name))


@router.delete("/{slug:name}", response={204: None})
def delete_deployment(request: AuthenticatedRequest, name: str, confirm: str) -> HttpResponse:
    """Delete the deployment; `confirm` repeats its name. Its versions are kept."""
    services.delete_deployment(request.user, get_deployment(request, name), confirm)
    return HttpResponse(status=204)
