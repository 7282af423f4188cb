"""The API for your webhooks."""

from typing import Any

from ninja import Router, Schema, Status
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from training.people.api import check_session_auth
from training.people.pagination import Pagination
from training.people.requests import AuthenticatedRequest
from training.webhooks import services
from training.webhooks.models import Webhook

router = Router(tags=["people"])


class WebhookIn(Schema):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"url": "https://chat.example.com/hooks/snapml"}]},
    )
    url: str = Field(max_length=500)


class WebhookOut(Schema):
    id: int
    url: str


class WebhookCreatedOut(WebhookOut):
    secret: str


@router.get("", response=list[WebhookOut])
@paginate(Pagination)
def list_webhooks(request: AuthenticatedRequest) -> Any:
    return request.user.webhooks.all()


@router.post("", response={201: WebhookCreatedOut})
def create_webhook(request: AuthenticatedRequest, body: WebhookIn) -> Status[Webhook]:
    """Create a webhook that gets a signed message when one of your runs ends. Only this response
    contains its secret. Needs a session: tokens cannot create webhooks.
    """
    check_session_auth(request)
    return Status(201, services.add_webhook(request.user, body.url))


@router.delete("/{int:webhook_id}", response={204: None})
def delete_webhook(request: AuthenticatedRequest, webhook_id: int) -> Status[None]:
    services.remove_webhook(request.user, webhook_id)
    return Status(204, None)
