"""The inference server's HTTP: OpenAI's models, chat completions and completions, on loopback,
protected by a token.

Only the site calls it. The paths of base model and adapter are in the field `snapml`; the site has
checked that its user may see them. Another server, such as vLLM, ignores that field and uses the
model's name.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import anyio
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
from adapters.inference.openai_schemas import ResponseBuilder, parse_requests, sum_speed, sum_usage
from adapters.inference.request_queue import MAX_REQUESTS, RequestQueue
from adapters.inference.types import GenerationRequest, QueueFull, StreamEvent

MAX_MODEL_NAMES = 1000
RETRY_SECONDS = 5
MAX_PROMPTS = 16
# Threads that wait for the next event, one per request.
STREAM_LIMITER = anyio.CapacityLimiter(2 * MAX_REQUESTS)


class Server:
    """The HTTP endpoints. Created by `make_app` and run in uvicorn's event loop. It shares only the
    request queue with the scheduler's thread.
    """

    def __init__(self, request_queue: RequestQueue, token: str) -> None:
        self.request_queue = request_queue
        self.token = token
        # The field `snapml` of the last request for each model name
        self.locations: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.started_at = int(time.time())

    async def get_health(self, _request: Request) -> Response:
        return JSONResponse({"active_requests": self.request_queue.count})

    async def list_models(self, request: Request) -> Response:
        """The models requested so far, most recent last."""
        self.check_token(request)
        entries = [
            {"id": name, "object": "model", "created": self.started_at, "owned_by": "snapml"}
            for name in self.locations
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def answer_chat(self, request: Request) -> Response:
        return await self.answer_request(request, chat=True)

    async def create_completion(self, request: Request) -> Response:
        return await self.answer_request(request, chat=False)

    async def answer_request(self, request: Request, *, chat: bool) -> Response:
        self.check_token(request)
        body = await read_body(request)
        location = self.find_location(body)
        generation_requests = parse_requests(body, location, chat=chat)
        if len(generation_requests) > MAX_PROMPTS or (
            len(generation_requests) > 1 and body.get("stream")
        ):
            raise InvalidField(
                f"A request may have at most {MAX_PROMPTS} prompts, or one if it is streamed.",
                "prompt",
            )
        self.submit_requests(generation_requests)
        builder = ResponseBuilder(str(body.get("model", "")), chat=chat)
        if body.get("stream"):
            include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(
                stream_sse(generation_requests[0], builder, include_usage=include_usage),
                media_type="text/event-stream",
            )
        event_lists = await collect_events(request, generation_requests)
        for final_event in (events[-1] for events in event_lists):
            if "error" in final_event:
                is_client_error = final_event.get("fault") == "client"
                raise HttpError(
                    400 if is_client_error else 500,
                    final_event["error"],
                    kind=error_kind(final_event),
                    param=final_event.get("param"),
                    code=final_event.get("code"),
                )
        return JSONResponse(builder.build_response(event_lists))

    def submit_requests(self, generation_requests: list[GenerationRequest]) -> None:
        """Submit all requests or none. Raises HttpError: the queue is full."""
        for index, generation_request in enumerate(generation_requests):
            try:
                self.request_queue.submit_request(generation_request)
            except QueueFull as busy:
                for submitted in generation_requests[:index]:
                    submitted.cancelled.set()
                raise HttpError(
                    429,
                    str(busy),
                    kind="rate_limit_error",
                    code="busy",
                    retry_seconds=RETRY_SECONDS,
                ) from busy

    def check_token(self, request: Request) -> None:
        provided_token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(provided_token.encode(), self.token.encode()):
            raise HttpError(
                401,
                "The token is missing or wrong.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def find_location(self, body: dict[str, Any]) -> dict[str, Any]:
        name, location = str(body.get("model", "")), body.get("snapml")
        if location is None and name in self.locations:
            return self.locations[name]
        if not isinstance(location, dict) or not location.get("base"):
            raise HttpError(
                404, f"The model {name!r} does not exist.", param="model", code="model_not_found"
            )
        self.locations[name] = location
        self.locations.move_to_end(name)
        if len(self.locations) > MAX_MODEL_NAMES:
            self.locations.popitem(last=False)
        return location


def make_app(request_queue: RequestQueue, token: str) -> Starlette:
    server = Server(request_queue, token)
    routes = [
        Route("/health", server.get_health),
        Route("/v1/models", server.list_models),
        Route("/v1/chat/completions", server.answer_chat, methods=["POST"]),
        Route("/v1/completions", server.create_completion, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)


async def stream_events(generation_request: GenerationRequest) -> AsyncIterator[StreamEvent]:
    """The events of a request up to the final one. If the client disconnects, the request is
    cancelled.
    """
    try:
        while True:
            event = await anyio.to_thread.run_sync(
                generation_request.events.get, limiter=STREAM_LIMITER, abandon_on_cancel=True
            )
            yield event
            if "done" in event or "error" in event:
                return
    finally:
        generation_request.cancelled.set()


async def collect_events(
    request: Request, generation_requests: list[GenerationRequest]
) -> list[list[StreamEvent]]:
    """All events of each request. If the client disconnects, all requests are canceled."""

    async def collect_stream(generation_request: GenerationRequest) -> list[StreamEvent]:
        return [event async for event in stream_events(generation_request)]

    async def watch_disconnect() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        for generation_request in generation_requests:
            generation_request.cancelled.set()

    watcher = asyncio.create_task(watch_disconnect())
    try:
        return list(
            await asyncio.gather(
                *(collect_stream(generation_request) for generation_request in generation_requests)
            )
        )
    finally:
        watcher.cancel()


async def stream_sse(
    generation_request: GenerationRequest, builder: ResponseBuilder, *, include_usage: bool
) -> AsyncIterator[str]:
    """The response as server-sent events in OpenAI's format."""
    if builder.chat:
        yield format_sse(builder.build_role_chunk(0))
    async for event in stream_events(generation_request):
        if "status" in event:
            yield format_sse(builder.build_extra_chunk(snapml={"status": event["status"]}))
        elif "text" in event or "reasoning" in event or "tool_call" in event:
            yield format_sse(builder.build_event_chunk(0, event))
        elif "error" in event:
            error = error_body(
                event["error"],
                kind=error_kind(event),
                param=event.get("param"),
                code=event.get("code"),
            )
            yield format_sse(error)
        elif "done" in event:
            yield format_sse(builder.build_chunk(0, {}, event["done"]))
            if include_usage:
                yield format_sse(
                    builder.build_extra_chunk(usage=sum_usage([event]), snapml=sum_speed([event]))
                )
    yield "data: [DONE]\n\n"


def error_kind(final_event: StreamEvent) -> str:
    return "invalid_request_error" if final_event.get("fault") == "client" else "server_error"


def format_sse(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload)}\n\n"
