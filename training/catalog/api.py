"""The API for base models. All users can read them; admins add them."""

from typing import Any, Literal

from ninja import Router, Schema, Status
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from training.catalog import services
from training.catalog.models import BaseModel
from training.errors import NotFound
from training.people.pagination import Pagination
from training.people.requests import AuthenticatedRequest

router = Router(tags=["models"])


class ModelOut(Schema):
    id: int
    name: str
    source: str
    revision: str
    state: str
    progress: float
    error: str
    metadata: dict[str, Any]


class ModelIn(Schema):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"source": "hub", "location": "owner/model"}]},
    )
    source: Literal["folder", "hub"]
    location: str = Field(
        max_length=500, description="A folder on the server, or a Hub id such as owner/model."
    )
    revision: str = Field("", max_length=100)


@router.post("", response={201: ModelOut})
def add_model(request: AuthenticatedRequest, body: ModelIn) -> Status[BaseModel]:
    """Admins only. A Hub model is downloaded in the background; poll its `state`."""
    if body.source == "hub":
        return Status(
            201, services.add_from_hub(request.user, body.location.strip(), body.revision.strip())
        )
    return Status(201, services.add_folder(request.user, body.location.strip()))


@router.post("/{int:model_id}/retry", response=ModelOut)
def retry_model(request: AuthenticatedRequest, model_id: int) -> BaseModel:
    """Admins only: retry a failed import."""
    services.retry_import(request.user, read_model(request, model_id))
    return read_model(request, model_id)


@router.get("", response=list[ModelOut])
@paginate(Pagination)
def list_models(request: AuthenticatedRequest) -> Any:
    return BaseModel.objects.all()


@router.get("/{int:model_id}", response=ModelOut)
def read_model(request: AuthenticatedRequest, model_id: int) -> BaseModel:
    model = BaseModel.objects.filter(pk=model_id).first()
    if model is None:
        raise NotFound(f"Base model {model_id} not found.")
    return model
