"""What the page's "Try it" asks, and the answer passed on while it comes. When nobody answers, the
answer says so.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from adapters.models import AdapterVersion
from adapters.serving import inference_client
from training.datasets.rows import ROLES
from training.errors import UserError

MAX_CHARACTERS = 20_000


def question(version: AdapterVersion, body: dict[str, Any]) -> dict[str, Any]:
    """The request to the inference program for the base (`who` is base) or the adapter.

    Raises:
        UserError: a field is missing or too long.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("Write a message first.", field="messages")
    for message in messages:
        fits = (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        )
        if not fits:
            raise UserError(
                "Every message needs a role (system, user, assistant, tool) and text.",
                field="messages",
            )
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise UserError(
            f"The conversation has more than {MAX_CHARACTERS:,} characters; start a new one.",
            field="messages",
        )
    who = body.get("who")
    if who not in ("base", "adapter"):
        raise UserError("`who` must be base or adapter.", field="who")
    return {
        **(inference_client.addressed(version) if who == "adapter" else beside(version)),
        "messages": [
            {"role": message["role"], "content": message["content"]} for message in messages
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": number(body, "temperature", 0.0, 2.0, default=0.0),
        "top_p": number(body, "top_p", 0.01, 1.0, default=1.0),
        "max_tokens": int(number(body, "max_tokens", 1, 2048, default=200)),
    }


def beside(version: AdapterVersion) -> dict[str, Any]:
    """The base of a version, in 4 bits if it was trained so."""
    return inference_client.addressed_base(
        version.base_model, quantised=version.method_row.has_quantized_base
    )


def number(body: dict[str, Any], name: str, low: float, high: float, *, default: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}.", field=name)
    return float(value)


async def answer(request: dict[str, Any]) -> AsyncIterator[bytes]:
    """The inference program's server-sent events, or one event with an `error`."""
    try:
        async with inference_client.asked("/v1/chat/completions", request) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                yield event_of(inference_client.reason(response))
                return
            async for piece in response.aiter_bytes():
                yield piece
    except inference_client.Down as error:
        yield event_of(error.message)


def event_of(message: str) -> bytes:
    return f"data: {json.dumps({'error': {'message': message}})}\n\n".encode()
