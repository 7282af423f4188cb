"""The REST API under `/api/v1/`: mounts the apps' routers and formats every error as `{"error":
{"message", "field"}}`.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.utils.datastructures import MultiValueDict
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, HttpError, ValidationError
from ninja.parser import Parser
from ninja.security import HttpBearer, SessionAuth

from adapters.api import router as adapters
from adapters.evaluation.api import router as comparisons
from adapters.serving.api import router as deployments
from snapml_site.middleware import find_user_error
from training.catalog.api import router as models
from training.datasets.api import router as datasets
from training.errors import NotAllowed, UserError
from training.gpus.api import router as gpus
from training.people.api import router as people
from training.people.current_user import current_username
from training.people.models import Scope, User
from training.people.tokens import find_token
from training.runs.api import router as runs
from training.text_input import check_text, parse_json
from training.webhooks.api import router as webhooks

log = logging.getLogger("snapml.api")
UNAUTHENTICATED_MESSAGE = "Sign in, or send a valid token as `Authorization: Bearer TOKEN`."


class TokenAuth(HttpBearer):
    def authenticate(self, request: HttpRequest, token: str) -> User | None:
        api_token = find_token(token)
        if api_token is None:
            return None
        if api_token.scope == Scope.READ and request.method not in ("GET", "HEAD"):
            raise NotAllowed(
                "This token is read-only. Create a token with write access on the account page."
            )
        request.user = api_token.user
        request.is_token_auth = True  # type: ignore[attr-defined]
        current_username.set(api_token.user.username)
        return api_token.user


class PageAuth(SessionAuth):
    """Session authentication for the browser, with CSRF checks on unsafe methods. Users who must
    change a one-time password are not authenticated.
    """

    def __call__(self, request: HttpRequest) -> Any:
        """Without a session, or with a token, which then decides alone, the answer is a 401 and not
        the 403 of the CSRF check.
        """
        scheme = request.headers.get("Authorization", "").partition(" ")[0]
        if scheme.lower() == TokenAuth.openapi_scheme or not request.user.is_authenticated:
            return None
        return super().__call__(request)

    def authenticate(self, request: HttpRequest, key: str | None) -> Any:
        user = request.user
        return user if user.is_authenticated and not user.must_change_password else None


class CheckingParser(Parser):
    """Checks the text and numbers of bodies, forms and queries (training/text_input.py)."""

    def parse_body(self, request: HttpRequest) -> Any:
        return parse_json(request.body, "The request")

    def parse_querydict(
        self, data: MultiValueDict[str, Any], list_fields: list[str], request: HttpRequest
    ) -> dict[str, Any]:
        for name, values in data.lists():
            for value in values:
                check_text(value if isinstance(value, str) else value.name, name)
        return super().parse_querydict(data, list_fields, request)


class Api(NinjaAPI):
    """NinjaAPI whose OpenAPI schema lists the error responses of every operation."""

    def get_openapi_schema(self, **options: Any) -> Any:
        schema = super().get_openapi_schema(**options)
        schema["components"]["schemas"]["Problem"] = PROBLEM
        response = {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        }
        for operations in schema["paths"].values():
            for operation in operations.values():
                for status, description in PROBLEMS.items():
                    operation["responses"].setdefault(
                        status, {"description": description, **response}
                    )
        return schema


PROBLEM = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "field"],
            "properties": {"message": {"type": "string"}, "field": {"type": "string"}},
        }
    },
}
PROBLEMS = {
    400: "The request is invalid; the message says why.",
    401: "Missing or invalid token or session.",
    403: "You are not allowed to do this.",
    404: "Not found, or not visible to you.",
    409: "The current state does not allow this, or a warning was not accepted.",
    413: "Larger than the limit that the message names.",
    422: "A field has the wrong type or is out of range; `field` names it.",
    429: "Too many requests; try again later.",
    507: "The server's disk is full or read-only.",
}

api = Api(
    title="SnapML",
    version="1",
    urls_namespace="api",
    auth=[TokenAuth(), PageAuth()],
    docs_url=None,
    docs_decorator=lambda view: csrf_exempt(require_safe(view)),  # of the OpenAPI schema
    parser=CheckingParser(),
    description="Fine-tune language models. Send `Authorization: Bearer TOKEN`; `manage.py token "
    "USER` creates a token.",
)
api.add_router("/people", people)
api.add_router("/people/me/webhooks", webhooks)
api.add_router("/models", models)
api.add_router("/datasets", datasets)
api.add_router("/gpus", gpus)
api.add_router("/runs", runs)
api.add_router("/adapters", adapters)
api.add_router("/comparisons", comparisons)
api.add_router("/deployments", deployments)


def problem_response(
    request: HttpRequest, message: str, status: int, field: str = ""
) -> HttpResponse:
    return api.create_response(request, problem_body(message, field), status=status)


def problem_body(message: str, field: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "field": field}}


@api.exception_handler(UserError)
def on_user_error(request: HttpRequest, error: UserError) -> HttpResponse:
    return problem_response(request, error.message, error.status, error.field)


@api.exception_handler(ValidationError)
def on_validation_error(request: HttpRequest, error: ValidationError) -> HttpResponse:
    first = error.errors[0]
    field = ".".join(str(part) for part in first["loc"][1:] if part != "body")
    return problem_response(request, f"{field}: {first['msg']}", 422, field)


@api.exception_handler(AuthenticationError)
def on_unauthenticated(request: HttpRequest, _error: AuthenticationError) -> HttpResponse:
    return problem_response(request, UNAUTHENTICATED_MESSAGE, 401)


@api.exception_handler(Http404)
def on_not_found(request: HttpRequest, _error: Http404) -> HttpResponse:
    return problem_response(request, "Not found.", 404)


@api.exception_handler(Exception)
def on_exception(request: HttpRequest, error: Exception) -> HttpResponse:
    user_error = find_user_error(error)
    if user_error:
        return on_user_error(request, user_error)
    log.error("API error at %s.", request.path, exc_info=error)
    return problem_response(request, "Internal server error. See the server log for details.", 500)


@api.exception_handler(HttpError)
def on_http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    if isinstance(error.__cause__, UserError):  # raised by the parser
        return on_user_error(request, error.__cause__)
    response = problem_response(request, str(error), error.status_code)
    # Ninja's only 403 is a failed CSRF check, which Django has logged with the reason
    response._has_been_logged = error.status_code == HTTPStatus.FORBIDDEN  # type: ignore[attr-defined]
    return response
