"""`/v1/`: deployments behind OpenAI's API, for whoever has a token of somebody who may see them.

An ASGI application of its own beside Django's: it streams, and Django's middlewares (sessions,
CSRF) have no part in it. Who answers is decided once, when a request arrives, so a switch drops
nothing and mixes nothing.
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

from adapters.inference.openai_http import HttpError, error_body, openai_errors, read_body
from adapters.models import Deployment
from adapters.serving import inference_client
from adapters.serving.services import drawn
from adapters.serving.usage import Answered, note
from training.people.models import User
from training.people.tokens import find_token

OWN_FIELDS = ("snapml", "prompt_logprobs")  # between the site and the inference program
log = logging.getLogger("snapml.gateway")


async def models(request: Request) -> Response:
    user = await caller(request)
    return JSONResponse({"object": "list", "data": await in_database(names_for, user)})


async def model(request: Request) -> Response:
    user = await caller(request)
    for one in await in_database(names_for, user):
        if one["id"] == request.path_params["name"]:
            return JSONResponse(one)
    raise HttpError(404, "There is no such deployment that you may ask.", code="model_not_found")


async def chat(request: Request) -> Response:
    return await pass_on(request, "/v1/chat/completions")


async def complete(request: Request) -> Response:
    return await pass_on(request, "/v1/completions")


async def pass_on(request: Request, path: str) -> Response:
    user = await caller(request)
    body = await read_body(request)
    passage = Passage(*await in_database(chosen, user, str(body.get("model", ""))), body=body)
    try:
        return await passage.through(path)
    except inference_client.Down as down:
        await passage.end(failed=True)
        raise HttpError(503, down.message, kind="server_error", code="down") from down


class Passage:
    """One request on its way through: who answers it, what the caller wants of it, and what is
    noted of it.
    """

    def __init__(
        self, deployment: Deployment, told: dict[str, Any], version_id: int, *, body: dict[str, Any]
    ) -> None:
        self.deployment, self.version_id = deployment, version_id
        self.began = time.monotonic()
        self.first_seconds: float | None = None
        self.usage: dict[str, int] = {}
        self.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        kept = {name: value for name, value in body.items() if name not in OWN_FIELDS}
        streamed = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
        self.body = {**kept, **told, **streamed}

    async def through(self, path: str) -> Response:
        """The answer, or what the inference program says instead.

        Raises:
            inference_client.Down: nobody answers, or the answer broke off.
        """
        async with AsyncExitStack() as stack:
            response = await stack.enter_async_context(inference_client.asked(path, self.body))
            if response.status_code != httpx.codes.OK:
                await response.aread()
                if (
                    response.status_code >= 500
                    or response.status_code == httpx.codes.TOO_MANY_REQUESTS
                ):
                    # What is the caller's own fault is no answer and no failure
                    await self.end(failed=True)
                retry = {
                    name: response.headers[name]
                    for name in ("Retry-After",)
                    if name in response.headers
                }
                return Response(response.content, response.status_code, retry, "application/json")
            if self.body.get("stream"):
                return StreamingResponse(
                    self.events(response, stack.pop_all()), media_type="text/event-stream"
                )
            return JSONResponse(await self.whole(response))
        raise AssertionError  # the block returns or raises

    async def whole(self, response: httpx.Response) -> dict[str, Any]:
        await response.aread()
        told = self.named(response.json())
        self.usage = told.get("usage") or {}
        await self.end()
        return told

    async def events(self, response: httpx.Response, stack: AsyncExitStack) -> AsyncIterator[str]:
        """The events as they come, under the deployment's name. A caller who hangs up ends the line
        to the inference program.
        """
        failed, over = False, False
        try:
            async with stack:
                async for told in inference_client.events_of(response):
                    failed = failed or "error" in told
                    self.usage = told.get("usage") or self.usage
                    if self.first_seconds is None and any(
                        spoken(choice) for choice in told.get("choices", ())
                    ):
                        self.first_seconds = time.monotonic() - self.began
                    if (
                        "error" in told
                        or told.get("choices")
                        or (self.wants_usage and told.get("usage"))
                    ):
                        yield f"data: {json.dumps(self.named(told))}\n\n"
            yield "data: [DONE]\n\n"
            over = True
        except inference_client.Down as down:
            failed = True
            error = error_body(down.message, kind="server_error", code="down")
            yield f"data: {json.dumps(error)}\n\n"
        finally:
            if over or failed:  # one who hung up was not answered, and nothing failed
                await self.end(failed=failed)

    def named(self, told: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in told.items() if name not in OWN_FIELDS}
        return {**told, "model": self.deployment.name} if "model" in told else told

    async def end(self, *, failed: bool = False) -> None:
        answered = Answered(
            deployment_id=self.deployment.pk,
            version_id=self.version_id,
            seconds=time.monotonic() - self.began,
            first_seconds=self.first_seconds,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            completion_tokens=self.usage.get("completion_tokens", 0),
            failed=failed,
        )
        try:
            await in_database(note, answered)
        except DatabaseError:
            # The caller gets it all the same
            log.exception("An answer of %s could not be noted.", self.deployment.name)


def spoken(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))


def names_for(user: User) -> list[dict[str, Any]]:
    """The deployments that somebody may ask, as OpenAI lists models."""
    rows = Deployment.objects.visible_to(user).select_related("owner")
    return [
        {
            "id": row.name,
            "object": "model",
            "created": int(row.created_at.timestamp()),
            "owned_by": row.owner.username,
        }
        for row in rows
    ]


def chosen(user: User, name: str) -> tuple[Deployment, dict[str, Any], int]:
    """The deployment of a name, how its inference is addressed, and the version that answers this
    request.

    Raises:
        HttpError: there is none, or none that they may see; the two read the same.
    """
    rows = Deployment.objects.visible_to(user).select_related(
        "version__base_model", "other__base_model"
    )
    deployment = None if "\0" in name else rows.filter(name=name).first()
    if deployment is None:
        raise HttpError(
            404, f"There is no deployment {name[:80]!r} that you may ask.", code="model_not_found"
        )
    version = drawn(deployment)
    return deployment, inference_client.addressed(version, merge=deployment.merge), version.pk


async def caller(request: Request) -> User:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    token = await in_database(find_token, secret.strip()) if kind.lower() == "bearer" else None
    if token is None:
        raise HttpError(
            401,
            "Send a valid token as `Authorization: Bearer TOKEN`.",
            kind="authentication_error",
            code="invalid_api_key",
        )
    user: User = token.user
    return user


async def in_database(act: Callable[..., Any], *given: Any) -> Any:
    """Django's ORM from the event loop; a connection that the database has closed is opened
    again.
    """

    def fresh() -> Any:
        close_old_connections()
        return act(*given)

    return await sync_to_async(fresh)()


application = Starlette(
    routes=[
        Route("/v1/models", openai_errors(models)),
        Route("/v1/models/{name}", openai_errors(model)),
        Route("/v1/chat/completions", openai_errors(chat), methods=["POST"]),
        Route("/v1/completions", openai_errors(complete), methods=["POST"]),
    ]
)
