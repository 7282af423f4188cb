"""Parse OpenAI's requests and build its responses. An invalid request raises InvalidField with one
sentence and the name of the field.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from adapters.inference.openai_http import InvalidField
from adapters.inference.types import AdapterRef, BaseRef, GenerationRequest, StreamEvent

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOP_SEQUENCES = 4
# Fields that are not implemented, and the values that mean nothing. Others are rejected.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "suffix": (None, ""),
    "echo": (None, False),
    "response_format": (None, {"type": "text"}),
}


def parse_requests(body: Any, location: dict[str, Any], *, chat: bool) -> list[GenerationRequest]:
    """One request for a chat, one per prompt for completions.

    Raises:
        InvalidField: a field is wrong or not supported.
    """
    for name, allowed_values in UNSUPPORTED_FIELDS.items():
        if body.get(name) not in allowed_values:
            raise InvalidField(f"{name} is not supported. Leave it out.", name)
    max_tokens = body.get("max_completion_tokens")
    max_tokens = body.get("max_tokens") if max_tokens is None else max_tokens
    common: dict[str, Any] = {
        "base": BaseRef(
            Path(location["base"]),
            bool(location.get("quantized")),
            str(location.get("base_sha256", "")),
        ),
        "adapter": AdapterRef(Path(location["adapter"]), str(location["sha256"]))
        if location.get("adapter")
        else None,
        "max_tokens": None
        if max_tokens is None
        else int(parse_number(max_tokens, "max_tokens", 1, 1_000_000)),
        "temperature": parse_number(body.get("temperature"), "temperature", 0.0, 2.0, default=1.0),
        "top_p": parse_number(body.get("top_p"), "top_p", 0.0, 1.0, default=1.0),
        "seed": None
        if body.get("seed") is None
        else int(parse_number(body["seed"], "seed", -(2**63), 2**63 - 1)),
        "stop": parse_stop_sequences(body.get("stop")),
        "needs_logprobs": body.get("prompt_logprobs") is not None,
    }
    if chat:
        return [GenerationRequest(messages=parse_messages(body.get("messages")), **common)]
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(text, str) for text in prompts)
    ):
        raise InvalidField("prompt must be a string or a list of strings.", "prompt")
    return [GenerationRequest(prompt=text, **common) for text in prompts]


def parse_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InvalidField("messages must be a list with at least one message.", "messages")
    return [parse_message(message, index) for index, message in enumerate(value)]


def parse_message(message: Any, index: int) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InvalidField(
            f"messages[{index}] needs a role, one of {', '.join(ROLES)}.", "messages"
        )
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise InvalidField(f"The content of messages[{index}] must be text.", "messages")
    role = "system" if message["role"] == "developer" else str(message["role"])
    return {"role": role, "content": content}


def parse_stop_sequences(value: Any) -> tuple[str, ...]:
    sequences = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(sequences, list)
        or len(sequences) > MAX_STOP_SEQUENCES
        or not all(isinstance(sequence, str) and sequence for sequence in sequences)
    ):
        raise InvalidField(
            f"stop must be a string or a list of at most {MAX_STOP_SEQUENCES} strings.", "stop"
        )
    return tuple(sequences)


def parse_number(
    value: Any, name: str, low: float, high: float, *, default: float | None = None
) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidField(f"{name} must be a number from {low:g} to {high:g}.", name)
    return value


class ResponseBuilder:
    """Builds the response to one HTTP request, in one piece or in chunks, for chats and for text
    completions.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model = model
        self.chat = chat
        self.common_fields = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def build_chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = (
            {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        )
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": finish_reason}
        return {
            **self.common_fields,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "choices": [choice],
        }

    def build_role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat, with the role."""
        chunk = self.build_chunk(index, "", None)
        chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return chunk

    def build_extra_chunk(self, **fields: Any) -> dict[str, Any]:
        """A chunk without choices: the loading status, or the usage at the end."""
        return {**self.build_chunk(0, "", None), "choices": [], **fields}

    def build_response(self, event_lists: list[list[StreamEvent]]) -> dict[str, Any]:
        """The complete response from all events of each request, none of which is an error."""
        choices = [self._build_choice(index, events) for index, events in enumerate(event_lists)]
        final_events = [events[-1] for events in event_lists]
        logprobs = next(
            (format_prompt_logprobs(event) for event in event_lists[0] if "logprobs" in event), None
        )
        extra = {} if logprobs is None else {"prompt_logprobs": logprobs}
        object_type = "chat.completion" if self.chat else "text_completion"
        return {
            **self.common_fields,
            "object": object_type,
            "choices": choices,
            "usage": sum_usage(final_events),
            "snapml": sum_speed(final_events),
            **extra,
        }

    def _build_choice(self, index: int, events: list[StreamEvent]) -> dict[str, Any]:
        text = "".join(event.get("text", "") for event in events)
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": None, "finish_reason": events[-1]["done"]}


def sum_usage(final_events: list[StreamEvent]) -> dict[str, int]:
    prompt, completion = (
        sum(event["prompt_tokens"] for event in final_events),
        sum(event["completion_tokens"] for event in final_events),
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def sum_speed(final_events: list[StreamEvent]) -> dict[str, float]:
    return {"tokens_per_second": sum(event["tokens_per_second"] for event in final_events)}


def format_prompt_logprobs(event: StreamEvent) -> list[dict[str, dict[str, float]] | None]:
    """One entry per prompt token in vLLM's format: the token's id and its log-probability."""
    pairs = zip(event["ids"], event["logprobs"], strict=True)
    return [
        None if logprob is None else {str(token): {"logprob": logprob}} for token, logprob in pairs
    ]
