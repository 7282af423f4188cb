"""The OpenAI-compatible API under `/v1/`. A token can use every deployment that its owner may see.

This is an ASGI application beside Django's: it streams, and Django's middlewares (sessions, CSRF)
do not apply. The version is chosen once, when a request arrives, so that a switch neither drops
requests nor mixes two versions in one answer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from asgiref.sync import sync_to_async
from django.db import DatabaseError, close_old_connections
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from adapters.inference.openai_http import (
    EXCEPTION_HANDLERS,
    HttpError,
    InvalidField,
    error_body,
    read_body,
)
from adapters.models import Deployment
from adapters.serving import inference_client
from adapters.serving.services import pick_version
from adapters.serving.usage import RequestRecord, log_request
from training.people.models import User
from training.people.tokens import PasswordNotChanged, find_token
from training.text_input import clean_value

INTERNAL_FIELDS = ("snapml", "prompt_logprobs")  # between the site and the inference server
MAX_LISTED_MODELS = 1000
log = logging.getLogger("snapml.gateway")


async def list_models(request: Request) -> Response:
    user = await authenticate_caller(request)
    return JSONResponse(
        {"object": "list", "data": await run_in_database(list_deployment_models, user)}
    )


async def retrieve_model(request: Request) -> Response:
    user = await authenticate_caller(request)
    name = clean_value(request.path_params["name"])  # PostgreSQL refuses a NUL character
    models = await run_in_database(list_deployment_models, user, name)
    if not models:
        raise HttpError(404, "Deployment not found.", code="model_not_found")
    return JSONResponse(models[0])


async def create_chat_completion(request: Request) -> Response:
    return await proxy_request(request, "/v1/chat/completions")


async def create_completion(request: Request) -> Response:
    return await proxy_request(request, "/v1/completions")


async def proxy_request(request: Request, path: str) -> Response:
    user = await authenticate_caller(request)
    body = await read_body(request)
    if body.get("prompt_logprobs") is not None:
        raise InvalidField("prompt_logprobs is not supported. Leave it out.", "prompt_logprobs")
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise InvalidField("model must be the name of a deployment.", "model")
    proxied = ProxiedRequest(*await run_in_database(route_request, user, name), body=body)
    try:
        return await proxied.forward(path)
    except inference_client.InferenceUnavailable as unavailable:
        await proxied.log_usage(failed=True)
        raise HttpError(
            503, unavailable.message, kind="server_error", code="inference_unavailable"
        ) from unavailable


class ProxiedRequest:
    """A request on its way to the inference server: its deployment and version, its body, and what
    is logged of it.

    `proxy_request` creates one for each request. It lives in the event loop until the response or
    the stream ends.
    """

    def __init__(
        self,
        deployment: Deployment,
        target_fields: dict[str, Any],
        version_id: int,
        *,
        body: dict[str, Any],
    ) -> None:
        self.deployment, self.version_id = deployment, version_id
        self.started_at = time.monotonic()
        self.first_token_seconds: float | None = None
        self.usage: dict[str, int] = {}
        self.include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        forwarded = {name: value for name, value in body.items() if name not in INTERNAL_FIELDS}
        stream_options = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
        self.body = {**forwarded, **target_fields, **stream_options}

    async def forward(self, path: str) -> Response:
        """Send the request and return the response, or the error of the inference server.

        Raises:
            inference_client.InferenceUnavailable: no server answers, or the connection broke.
        """
        async with AsyncExitStack() as stack:
            response = await stack.enter_async_context(
                inference_client.stream_request(path, self.body)
            )
            if response.status_code != httpx.codes.OK:
                await response.aread()
                if (
                    response.status_code >= 500
                    or response.status_code == httpx.codes.TOO_MANY_REQUESTS
                ):
                    # A client error counts neither as an answer nor as a failure
                    await self.log_usage(failed=True)
                retry = {
                    name: response.headers[name]
                    for name in ("Retry-After",)
                    if name in response.headers
                }
                return JSONResponse(get_error_body(response), response.status_code, retry)
            if not self.body.get("stream"):
                return JSONResponse(await self.forward_json(response))
            events = inference_client.iter_events(response)
            opening = await read_opening(events)
            if opening and "error" in opening[-1]:
                is_client_error = opening[-1]["error"].get("type") == "invalid_request_error"
                if not is_client_error:
                    await self.log_usage(failed=True)
                return JSONResponse(
                    {"error": opening[-1]["error"]}, 400 if is_client_error else 500
                )
            return StreamingResponse(
                self.stream_events(chain_events(opening, events), stack.pop_all()),
                media_type="text/event-stream",
            )
        raise AssertionError  # unreachable: the block returns or raises

    async def forward_json(self, response: httpx.Response) -> dict[str, Any]:
        await response.aread()
        payload = self.rename_model(response.json())
        self.usage = payload.get("usage") or {}
        await self.log_usage()
        return payload

    async def stream_events(
        self, events: AsyncIterator[dict[str, Any]], stack: AsyncExitStack
    ) -> AsyncIterator[str]:
        """Forward the events as they arrive, with the model renamed to the deployment. When the
        client disconnects, the connection to the inference server is closed, too.
        """
        failed, is_complete = False, False
        try:
            async with stack:
                async for event in events:
                    failed = failed or "error" in event
                    self.usage = event.get("usage") or self.usage
                    if self.first_token_seconds is None and any(
                        has_content(choice) for choice in event.get("choices", ())
                    ):
                        self.first_token_seconds = time.monotonic() - self.started_at
                    if (
                        "error" in event
                        or event.get("choices")
                        or (self.include_usage and event.get("usage"))
                    ):
                        yield f"data: {json.dumps(self.rename_model(event))}\n\n"
            yield "data: [DONE]\n\n"
            is_complete = True
        except inference_client.InferenceUnavailable as unavailable:
            failed = True
            error = error_body(
                unavailable.message, kind="server_error", code="inference_unavailable"
            )
            yield f"data: {json.dumps(error)}\n\n"
        finally:
            if is_complete or failed:  # a disconnected client is not logged
                await self.log_usage(failed=failed)

    def rename_model(self, payload: dict[str, Any]) -> dict[str, Any]:
        payload = {name: value for name, value in payload.items() if name not in INTERNAL_FIELDS}
        return {**payload, "model": self.deployment.name} if "model" in payload else payload

    async def log_usage(self, *, failed: bool = False) -> None:
        record = RequestRecord(
            deployment_id=self.deployment.pk,
            version_id=self.version_id,
            seconds=time.monotonic() - self.started_at,
            first_token_seconds=self.first_token_seconds,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            completion_tokens=self.usage.get("completion_tokens", 0),
            failed=failed,
        )
        try:
            await run_in_database(log_request, record)
        except DatabaseError:
            # The client still gets its answer
            log.exception("Could not log a request to %s.", self.deployment.name)


async def read_opening(events: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events up to the first with content or an error, so that a request that fails before its
    first token gets a status.
    """
    opening = []
    async for event in events:
        opening.append(event)
        if "error" in event or any(
            has_content(choice) or choice.get("finish_reason")
            for choice in event.get("choices", ())
        ):
            break
    return opening


async def chain_events(
    opening: list[dict[str, Any]], events: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    for event in opening:
        yield event
    async for event in events:
        yield event


def get_error_body(response: httpx.Response) -> dict[str, Any]:
    """The inference server's error in OpenAI's format, which other servers do not always use."""
    try:
        body = response.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return {"error": {"type": "invalid_request_error", "param": None, "code": None, **error}}
    message = body.get("message") if isinstance(body, dict) else None
    kind = "invalid_request_error" if response.status_code < 500 else "server_error"
    fallback = f"The inference server answered with status {response.status_code}."
    return error_body(message if isinstance(message, str) else fallback, kind=kind)


def has_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(
        choice.get("text")
        or any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    )


def list_deployment_models(user: User, name: str = "") -> list[dict[str, Any]]:
    """The deployments that the user may see, or the one of this name, in the format of OpenAI's
    model list. That format has no pages.
    """
    rows = Deployment.objects.visible_to(user).select_related("owner")
    if name:
        rows = rows.filter(name=name)
    return [
        {
            "id": row.name,
            "object": "model",
            "created": int(row.created_at.timestamp()),
            "owned_by": row.owner.username,
        }
        for row in rows[:MAX_LISTED_MODELS]
    ]


def route_request(user: User, name: str) -> tuple[Deployment, dict[str, Any], int]:
    """Find the deployment and choose the version for this request. Returns (deployment, target
    fields, version ID).

    Raises:
        HttpError: there is no such deployment, or the user may not see it. Both give the same
            message.
    """
    rows = Deployment.objects.visible_to(user).select_related(
        "version__base_model", "canary__base_model"
    )
    deployment = rows.filter(name=name).first()
    if deployment is None:
        raise HttpError(
            404, f"Deployment {name[:80]!r} not found.", param="model", code="model_not_found"
        )
    version = pick_version(deployment)
    return (
        deployment,
        inference_client.build_target_fields(version, user, use_merged=deployment.use_merged),
        version.pk,
    )


async def authenticate_caller(request: Request) -> User:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    is_bearer = kind.lower() == "bearer"
    try:
        token = await run_in_database(find_token, secret.strip()) if is_bearer else None
    except PasswordNotChanged as error:
        raise HttpError(
            error.status, error.message, kind="authentication_error", code=error.code
        ) from error
    if token is None:
        raise HttpError(
            401,
            "Send a valid token as `Authorization: Bearer TOKEN`.",
            kind="authentication_error",
            code="invalid_api_key",
        )
    user: User = token.user
    return user


async def run_in_database(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that uses Django's ORM from the event loop, on a fresh connection if the
    database has closed the old one.
    """

    def run_with_fresh_connection() -> Any:
        close_old_connections()
        return function(*args)

    return await sync_to_async(run_with_fresh_connection)()


application = Starlette(
    routes=[
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", retrieve_model),
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/v1/completions", create_completion, methods=["POST"]),
    ],
    exception_handlers=EXCEPTION_HANDLERS,
)
