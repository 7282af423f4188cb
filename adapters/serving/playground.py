"""The "Try it" form of an adapter's page: build the request and stream the answer or an error
event.
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
from training.people.models import User

MAX_CHARACTERS = 20_000


def build_request(user: User, version: AdapterVersion, body: dict[str, Any]) -> dict[str, Any]:
    """The request to the inference server for the base model or the adapter, as `who` says.

    Raises:
        UserError: a field is missing or too long.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("Enter a message.", field="messages")
    for message in messages:
        is_valid = (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        )
        if not is_valid:
            raise UserError(
                "Every message needs a role (system, user, assistant, tool) and text.",
                field="messages",
            )
        unknown = sorted(message.keys() - {"role", "content"})
        if unknown:
            raise UserError(
                f"{unknown[0][:80]} of a message is not supported here. Deploy the adapter and use "
                "/v1/.",
                field="messages",
            )
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise UserError(
            f"The conversation exceeds {MAX_CHARACTERS:,} characters. Start a new one.",
            field="messages",
        )
    who = body.get("who")
    if who not in ("base", "adapter"):
        raise UserError("`who` must be base or adapter.", field="who")
    return {
        **(
            inference_client.build_target_fields(version, user)
            if who == "adapter"
            else get_base_fields(version, user)
        ),
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": parse_number(body, "temperature", 0.0, 2.0, default=0.0),
        "top_p": parse_number(body, "top_p", 0.01, 1.0, default=1.0),
        "max_tokens": int(parse_number(body, "max_tokens", 1, 2048, default=200)),
    }


def get_base_fields(version: AdapterVersion, user: User) -> dict[str, Any]:
    """The fields that select a version's base model, in 4 bits if the version was trained on 4
    bits.
    """
    return inference_client.build_base_target_fields(
        version.base_model, user, quantized=version.method_spec.has_quantized_base
    )


def parse_number(
    body: dict[str, Any], name: str, low: float, high: float, *, default: float
) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}.", field=name)
    return float(value)


async def stream_answer(request: dict[str, Any]) -> AsyncIterator[bytes]:
    """The inference server's events, or one event with an `error`."""
    try:
        async with inference_client.stream_request("/v1/chat/completions", request) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                yield format_error_event(inference_client.get_error_message(response))
                return
            async for chunk in response.aiter_bytes():
                yield chunk
    except inference_client.InferenceUnavailable as error:
        yield format_error_event(error.message)


def format_error_event(message: str) -> bytes:
    return f"data: {json.dumps({'error': {'message': message}})}\n\n".encode()
