"""The inference program's HTTP: OpenAI's chat completions, streamed or whole, on loopback behind a token.

Only the site calls it. Folders of base and adapter come in the field `snapml`, checked by the site against what its user may see.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from adapters.inference.held import Base, Weights
from adapters.inference.speaker import Busy, Question, Said, Speaker

MAX_BODY_BYTES = 1_000_000


def make_app(speaker: Speaker, token: str) -> Starlette:
    async def health(_request: Request) -> Response:
        base = speaker.held.base
        return JSONResponse({"base": str(base.folder) if base else "", "answering": len(speaker.answers)})

    async def chat(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), token.encode()):
            return problem(401, "A valid token is needed.")
        raw = await request.body()
        if len(raw) > MAX_BODY_BYTES:
            return problem(413, f"The request has more than {MAX_BODY_BYTES:,} bytes.")
        try:
            body = json.loads(raw)
            question = question_of(body)
        except (ValueError, KeyError, TypeError) as error:
            return problem(400, f"The request cannot be read: {error}")
        try:
            speaker.ask(question)
        except Busy as busy:
            return problem(429, str(busy), {"Retry-After": "5"})
        if body.get("stream"):
            return StreamingResponse(events(question, body.get("model", "")), media_type="text/event-stream")
        return JSONResponse(whole([piece async for piece in pieces(question)], body.get("model", "")))

    return Starlette(routes=[Route("/health", health), Route("/v1/chat/completions", chat, methods=["POST"])])


def question_of(body: dict[str, Any]) -> Question:
    place = body["snapml"]
    return Question(
        base=Base(Path(place["base"]), bool(place.get("quantised")), str(place.get("base_sha256", ""))),
        adapter=Weights(Path(place["adapter"]), str(place["sha256"])) if place.get("adapter") else None,
        messages=[{"role": str(m["role"]), "content": str(m["content"])} for m in body["messages"]],
        max_tokens=min(max(1, int(body.get("max_tokens", 200))), 2048),
        temperature=min(max(0.0, float(body.get("temperature", 0.0))), 2.0),
        top_p=min(max(0.01, float(body.get("top_p", 1.0))), 1.0),
        seed=int(body.get("seed", 0)),
    )


async def pieces(question: Question) -> AsyncIterator[Said]:
    """What is said, to the last word. A caller who hangs up cancels this, and the speaker is told."""
    try:
        while True:
            said = await run_in_threadpool(question.said.get)
            yield said
            if "done" in said or "error" in said:
                return
    finally:
        question.hung_up.set()


async def events(question: Question, model: str) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's shape."""
    async for piece in pieces(question):
        if "text" in piece:
            chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": piece["text"]}, "finish_reason": None}]}
        elif "status" in piece:
            chunk = {"choices": [], "snapml": {"status": piece["status"]}}
        elif "error" in piece:
            chunk = {"error": {"message": piece["error"], "type": "server_error"}}
        else:
            chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": piece["done"]}], **usage(piece)}
        yield f"data: {json.dumps({'object': 'chat.completion.chunk', 'model': model, **chunk})}\n\n"
    yield "data: [DONE]\n\n"


def whole(said: list[Said], model: str) -> dict[str, Any]:
    last = said[-1]
    if "error" in last:
        return {"error": {"message": last["error"], "type": "server_error"}}
    text = "".join(piece.get("text", "") for piece in said)
    message = {"role": "assistant", "content": text}
    return {
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": last["done"]}],
        **usage(last),
    }


def usage(last: Said) -> dict[str, Any]:
    prompt, completion = last["prompt_tokens"], last["completion_tokens"]
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "snapml": {"tokens_per_second": last["tokens_per_second"]},
    }


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)
