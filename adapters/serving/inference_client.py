"""Client of the inference server at INFERENCE_URL: SnapML's own, or another OpenAI-compatible
server such as vLLM.

SnapML's server finds the base model and adapter by the field `snapml`. Other servers ignore that
field and go by the model's name; an adapter that they do not know is loaded with vLLM's
`/v1/load_lora_adapter`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from django.conf import settings

from adapters.export import merge as export_merge
from adapters.models import AdapterVersion, file_stem
from training.catalog.models import BaseModel
from training.engine.methods import METHODS
from training.errors import UserError
from training.people.models import User

# Without streaming, the first byte arrives with the full answer: 4,096 tokens at 7 tokens/s.
TIMEOUT = httpx.Timeout(5.0, read=600.0)
UNAVAILABLE_MESSAGE = (
    "The inference server is down. SnapML restarts its own server automatically; try again in a "
    "few seconds."
)


class InferenceUnavailable(UserError):
    """No server answers at INFERENCE_URL, or the connection broke."""

    status = 503


def build_target_fields(
    version: AdapterVersion, user: User | None, *, use_merged: bool = False
) -> dict[str, Any]:
    """The fields of a request that select a version, and the user whose share it counts for."""
    return {
        "model": f"{file_stem(version)}-{version.pk}",
        "snapml": {
            **get_model_location(version, use_merged=use_merged),
            "user": get_username(user),
        },
    }


def build_base_target_fields(
    base: BaseModel, user: User | None, *, quantized: bool = False
) -> dict[str, Any]:
    """The fields of a request that select a base model, and the user whose share it counts for."""
    return {
        "model": base.name,
        "snapml": {
            "base": str(base.folder),
            "quantized": quantized,
            "user": get_username(user),
        },
    }


def get_username(user: User | None) -> str:
    """The name for which requests are counted; those of SnapML itself have an empty one."""
    return user.username if user else ""


@asynccontextmanager
async def stream_request(path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
    """Send a request and yield the unread response, whatever its status.

    Raises:
        InferenceUnavailable: no server answers, or the connection broke.
    """
    if not settings.INFERENCE_URL:
        raise InferenceUnavailable(UNAVAILABLE_MESSAGE)
    headers = {"Authorization": f"Bearer {settings.INFERENCE_TOKEN}"}
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False, headers=headers) as client:
            response = await send_request(client, path, body)
            location = body.get("snapml", {})
            adapter = location.get("adapter") or location.get("lora")
            if response.status_code == httpx.codes.NOT_FOUND and adapter:
                await response.aclose()
                load_request = {"lora_name": body["model"], "lora_path": adapter}
                await client.post(
                    f"{settings.INFERENCE_URL}/v1/load_lora_adapter", json=load_request
                )
                response = await send_request(client, path, body)
            try:
                yield response
            finally:
                await response.aclose()
    except httpx.ConnectError as error:
        raise InferenceUnavailable(UNAVAILABLE_MESSAGE) from error
    except httpx.HTTPError as error:
        raise InferenceUnavailable(
            f"The answer was interrupted ({type(error).__name__}). Try again."
        ) from error


async def send_request(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> httpx.Response:
    request = client.build_request("POST", f"{settings.INFERENCE_URL}{path}", json=body)
    return await client.send(request, stream=True)


async def iter_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to `[DONE]`."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def get_error_message(response: httpx.Response) -> str:
    """The message of an error response, which must have been read."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return f"Busy: {message}"
    return f"The inference server rejected the request: {message}"


def get_model_location(version: AdapterVersion, *, use_merged: bool) -> dict[str, Any]:
    """The paths of the weights for a version: of the merged model if requested and available, else
    of base and adapter.

    `lora` is for other servers, which do not know SnapML's merged models.
    """
    if version.is_full_model:
        return {"base": str(version.folder), "base_sha256": version.sha256}
    if use_merged and export_merge.is_merged(version):
        return {
            "base": str(version.merged_folder),
            "base_sha256": version.sha256,
            "lora": str(version.folder),
        }
    return {
        "base": str(version.base_model.folder),
        "quantized": METHODS[version.method].has_quantized_base,
        "adapter": str(version.folder),
        "sha256": version.sha256,
    }
