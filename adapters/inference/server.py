"""The inference program's HTTP: OpenAI's models, chat completions and completions, on loopback
behind a token.

Only the site calls it. Where base and adapter lie comes in the field `snapml`, checked by the site
against what its user may see; another server (vLLM, say) leaves that field unread and goes by the
name of the model.
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
    HttpError,
    InvalidField,
    error_body,
    openai_errors,
    read_body,
)
from adapters.inference.openai_schemas import Shape, questions_of, speed, usage
from adapters.inference.request_queue import MAX_QUESTIONS, Desk
from adapters.inference.types import Busy, Question, Said

MAX_NAMES = 1000
RETRY_SECONDS = 5
MOST_PROMPTS = 16
LISTENERS = anyio.CapacityLimiter(2 * MAX_QUESTIONS)  # a thread waits for each question's next word


class Server:
    def __init__(self, desk: Desk, token: str) -> None:
        self.desk = desk
        self.token = token
        # Of models asked for, and where they lie
        self.names: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.started = int(time.time())

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"answering": self.desk.count})

    async def models(self, request: Request) -> Response:
        """Those that have been asked for by name, newest last."""
        self.let_in(request)
        entries = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "snapml"}
            for name in self.names
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self.answer(request, chat=False)

    async def answer(self, request: Request, *, chat: bool) -> Response:
        self.let_in(request)
        body = await read_body(request)
        place = self.place_of(body)
        questions = questions_of(body, place, chat=chat)
        if len(questions) > MOST_PROMPTS or (len(questions) > 1 and body.get("stream")):
            raise InvalidField(
                f"A request has at most {MOST_PROMPTS} prompts, and one if it is streamed.",
                "prompt",
            )
        self.ask(questions)
        shape = Shape(str(body.get("model", "")), chat=chat)
        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(
                events(questions[0], shape, with_usage=with_usage), media_type="text/event-stream"
            )
        said = await hang_up_with(request, questions)
        for last in (one[-1] for one in said):
            if "error" in last:
                theirs = last.get("fault") == "theirs"
                raise HttpError(400 if theirs else 500, last["error"], kind=kind_of(last))
        return JSONResponse(shape.whole(said))

    def ask(self, questions: list[Question]) -> None:
        """All of them or none."""
        for place, question in enumerate(questions):
            try:
                self.desk.ask(question)
            except Busy as busy:
                for asked in questions[:place]:
                    asked.hung_up.set()
                raise HttpError(
                    429,
                    str(busy),
                    kind="rate_limit_error",
                    code="busy",
                    retry_seconds=RETRY_SECONDS,
                ) from busy

    def let_in(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            raise HttpError(
                401,
                "A valid token is needed.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def place_of(self, body: dict[str, Any]) -> dict[str, Any]:
        name, place = str(body.get("model", "")), body.get("snapml")
        if place is None and name in self.names:
            return self.names[name]
        if not isinstance(place, dict) or not place.get("base"):
            raise HttpError(
                404, f"There is no model {name!r} here.", param="model", code="model_not_found"
            )
        self.names[name] = place
        self.names.move_to_end(name)
        if len(self.names) > MAX_NAMES:
            self.names.popitem(last=False)
        return place


def make_app(desk: Desk, token: str) -> Starlette:
    server = Server(desk, token)
    routes = [
        Route("/health", server.health),
        Route("/v1/models", openai_errors(server.models)),
        Route("/v1/chat/completions", openai_errors(server.chat), methods=["POST"]),
        Route("/v1/completions", openai_errors(server.complete), methods=["POST"]),
    ]
    return Starlette(routes=routes)


async def pieces(question: Question) -> AsyncIterator[Said]:
    """What is said, to the last word. A caller who hangs up cancels this, and the speaker is
    told.
    """
    try:
        while True:
            said = await anyio.to_thread.run_sync(
                question.said.get, limiter=LISTENERS, abandon_on_cancel=True
            )
            yield said
            if "done" in said or "error" in said:
                return
    finally:
        question.hung_up.set()


async def hang_up_with(request: Request, questions: list[Question]) -> list[list[Said]]:
    """All that is said to each question. A caller who goes away meanwhile hangs up on all."""

    async def hear(question: Question) -> list[Said]:
        return [piece async for piece in pieces(question)]

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        for question in questions:
            question.hung_up.set()

    watching = asyncio.create_task(gone())
    try:
        return list(await asyncio.gather(*(hear(question) for question in questions)))
    finally:
        watching.cancel()


async def events(question: Question, shape: Shape, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's shape."""
    if shape.chat:
        yield event(shape.opening(0))
    async for piece in pieces(question):
        if "text" in piece:
            yield event(shape.chunk(0, piece["text"], None))
        elif "status" in piece:
            yield event(shape.aside(snapml={"status": piece["status"]}))
        elif "error" in piece:
            yield event(error_body(piece["error"], kind=kind_of(piece)))
        elif "done" in piece:
            yield event(shape.chunk(0, "", piece["done"]))
            if with_usage:
                yield event(shape.aside(usage=usage([piece]), snapml=speed([piece])))
    yield "data: [DONE]\n\n"


def kind_of(last: Said) -> str:
    return "invalid_request_error" if last.get("fault") == "theirs" else "server_error"


def event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told)}\n\n"
