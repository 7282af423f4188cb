"""Ask the inference program, and pass its answer on while it comes. When it is down or busy, the answer says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from django.conf import settings

from adapters.models import AdapterVersion
from training.engine.methods import TABLE
from training.errors import UserError

MAX_CHARACTERS = 20_000
ROLES = ("system", "user", "assistant", "tool")
# Loading a base may take a minute on a slow disk; a token never takes that long.
TIMEOUT = httpx.Timeout(5.0, read=120.0)
DOWN = "The inference program is down. It is started again by itself; try again in a few seconds."


def question(version: AdapterVersion, body: dict[str, Any]) -> dict[str, Any]:
    """The request to the inference program for the base (`who` is base) or the adapter.

    Raises:
        UserError: a field is missing or too long.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("Write a message first.", field="messages")
    for message in messages:
        fits = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not fits:
            raise UserError("Every message needs a role (system, user, assistant, tool) and text.", field="messages")
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise UserError(
            f"The conversation has more than {MAX_CHARACTERS:,} characters; start a new one.",
            field="messages",
        )
    who = body.get("who")
    if who not in ("base", "adapter"):
        raise UserError("`who` must be base or adapter.", field="who")
    return {
        "model": str(version) if who == "adapter" else version.base_model.name,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": number(body, "temperature", 0.0, 2.0, default=0.0),
        "top_p": number(body, "top_p", 0.01, 1.0, default=1.0),
        "max_tokens": int(number(body, "max_tokens", 1, 2048, default=200)),
        "snapml": places(version, who),
    }


def places(version: AdapterVersion, who: str) -> dict[str, Any]:
    """Where base and weights lie. The hash is with them because a run that went on writes new weights to the same folder.

    The base beside a QLoRA adapter is in 4 bits as it was trained; a run that trained the whole model left a base of its own.
    """
    if version.whole_model and who == "adapter":
        return {"base": str(version.folder), "base_sha256": version.sha256}
    return {
        "base": str(version.base_model.folder),
        "quantised": TABLE[version.method].quantised,
        "adapter": str(version.folder) if who == "adapter" else None,
        "sha256": version.sha256,
    }


def number(body: dict[str, Any], name: str, low: float, high: float, *, default: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}.", field=name)
    return float(value)


async def answer(request: dict[str, Any]) -> AsyncIterator[bytes]:
    """The inference program's server-sent events, or one event with an `error`."""
    if not settings.INFERENCE_URL:
        yield event_of(DOWN)
        return
    headers = {"Authorization": f"Bearer {settings.INFERENCE_TOKEN}"}
    address = f"{settings.INFERENCE_URL}/v1/chat/completions"
    try:
        async with (
            httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as client,
            client.stream("POST", address, json=request, headers=headers) as response,
        ):
            if response.status_code != httpx.codes.OK:
                await response.aread()
                yield event_of(reason(response))
                return
            async for piece in response.aiter_bytes():
                yield piece
    except httpx.ConnectError:
        yield event_of(DOWN)
    except httpx.HTTPError as error:
        yield event_of(f"The answer broke off ({type(error).__name__}); ask again.")


def reason(response: httpx.Response) -> str:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return f"Busy: {message}"
    return f"The inference program refused: {message}"


def event_of(message: str) -> bytes:
    return f"data: {json.dumps({'error': {'message': message}})}\n\n".encode()
