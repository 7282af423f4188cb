"""OpenAI's requests and answers as this program has them. Pure; what is wrong with a request is one
sentence and a field.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from adapters.inference.openai_http import InvalidField
from adapters.inference.types import Base, Question, Said, Weights

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_STOPS = 4
# Asked for and not to be had: better refused than silently left out.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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


def questions_of(body: Any, place: dict[str, Any], *, chat: bool) -> list[Question]:
    """One question for a chat, one a prompt for completions.

    Raises:
        InvalidField: a field is wrong or not supported.
    """
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) not in harmless:
            raise InvalidField(f"{name} is not supported here; leave it out.", name)
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    common: dict[str, Any] = {
        "base": Base(
            Path(place["base"]), bool(place.get("quantized")), str(place.get("base_sha256", ""))
        ),
        "adapter": Weights(Path(place["adapter"]), str(place["sha256"]))
        if place.get("adapter")
        else None,
        "max_tokens": None if most is None else int(number(most, "max_tokens", 1, 1_000_000)),
        "temperature": number(body.get("temperature"), "temperature", 0.0, 2.0, default=1.0),
        "top_p": number(body.get("top_p"), "top_p", 0.0, 1.0, default=1.0),
        "seed": None
        if body.get("seed") is None
        else int(number(body["seed"], "seed", -(2**63), 2**63 - 1)),
        "stop": stops_of(body.get("stop")),
        "score": body.get("prompt_logprobs") is not None,
    }
    if chat:
        return [Question(messages=messages_of(body.get("messages")), **common)]
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(one, str) for one in prompts)
    ):
        raise InvalidField("prompt must be a text or a list of texts.", "prompt")
    return [Question(prompt=one, **common) for one in prompts]


def messages_of(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise InvalidField("messages must be a list with at least one message.", "messages")
    return [message_of(message, place) for place, message in enumerate(given)]


def message_of(message: Any, place: int) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InvalidField(f"messages[{place}] needs a role: {', '.join(ROLES)}.", "messages")
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise InvalidField(f"messages[{place}] must have text as its content.", "messages")
    role = "system" if message["role"] == "developer" else str(message["role"])
    return {"role": role, "content": content}


def stops_of(given: Any) -> tuple[str, ...]:
    words = [given] if isinstance(given, str) else given or []
    if (
        not isinstance(words, list)
        or len(words) > MOST_STOPS
        or not all(isinstance(word, str) and word for word in words)
    ):
        raise InvalidField(f"stop must be a text or a list of at most {MOST_STOPS} texts.", "stop")
    return tuple(words)


def number(
    value: Any, name: str, low: float, high: float, *, default: float | None = None
) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidField(f"{name} must be a number from {low:g} to {high:g}.", name)
    return value


class Shape:
    """The answers of one request: whole, or chunk by chunk, for chats and for plain completions."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model = model
        self.chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = (
            {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        )
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": finish}
        return {
            **self.head,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "choices": [choice],
        }

    def opening(self, index: int) -> dict[str, Any]:
        """A chat's first chunk, which tells the role."""
        made = self.chunk(index, "", None)
        made["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return made

    def aside(self, **told: Any) -> dict[str, Any]:
        """A chunk without a choice: what is being loaded, or the usage at the end."""
        return {**self.chunk(0, "", None), "choices": [], **told}

    def whole(self, answers: list[list[Said]]) -> dict[str, Any]:
        """The whole answer from all that was said to each question; none of it is an error."""
        choices = [self._choice(index, said) for index, said in enumerate(answers)]
        last = [said[-1] for said in answers]
        scored = next((prompt_logprobs(piece) for piece in answers[0] if "logprobs" in piece), None)
        more = {} if scored is None else {"prompt_logprobs": scored}
        name = "chat.completion" if self.chat else "text_completion"
        return {
            **self.head,
            "object": name,
            "choices": choices,
            "usage": usage(last),
            "snapml": speed(last),
            **more,
        }

    def _choice(self, index: int, said: list[Said]) -> dict[str, Any]:
        text = "".join(piece.get("text", "") for piece in said)
        spoken: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        return {"index": index, **spoken, "logprobs": None, "finish_reason": said[-1]["done"]}


def usage(last: list[Said]) -> dict[str, int]:
    prompt, completion = (
        sum(said["prompt_tokens"] for said in last),
        sum(said["completion_tokens"] for said in last),
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def speed(last: list[Said]) -> dict[str, float]:
    return {"tokens_per_second": sum(said["tokens_per_second"] for said in last)}


def prompt_logprobs(piece: Said) -> list[dict[str, dict[str, float]] | None]:
    """One entry a token of the prompt, as vLLM has it: its id and the natural logarithm of its
    probability.
    """
    pairs = zip(piece["ids"], piece["logprobs"], strict=True)
    return [
        None if chance is None else {str(token): {"logprob": chance}} for token, chance in pairs
    ]
