"""Parse OpenAI's requests and build its responses. An invalid request raises InvalidField with one
sentence and the name of the field.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any
from uuid import uuid4

from adapters.inference.openai_http import InvalidField
from adapters.inference.types import AdapterRef, BaseRef, GenerationRequest, StreamEvent
from training.text_input import InvalidInput, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOP_SEQUENCES, MAX_STOP_CHARACTERS = 4, 256
MAX_TOOLS, MAX_TOOL_NAME_LENGTH = 128, 128
# What a request may hold; docs/adapters.md lists it. Any other field is rejected by its name,
# unless it is null or has a value that changes nothing (NEUTRAL_VALUES).
COMMON_FIELDS = frozenset(
    (
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "snapml",
        "prompt_logprobs",
    )
)
CHAT_FIELDS = COMMON_FIELDS | {
    "messages",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt"}
# These change no answer: they are for OpenAI's accounts, caches and logs.
IGNORED_FIELDS = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
)
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "suffix": ("",),
    "echo": (False,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
# Keys of a message by role. `function_call` and others are rejected by name.
MESSAGE_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "reasoning_content"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
# OpenAI returns these with its answers, so clients send them back: sources and the order of calls
IGNORED_MESSAGE_KEYS = frozenset(("annotations", "id", "index"))


def parse_requests(body: Any, location: dict[str, Any], *, chat: bool) -> list[GenerationRequest]:
    """One request for a chat, one per prompt for completions.

    Raises:
        InvalidField: a field is wrong or not supported.
    """
    check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    limit_name = (
        "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    )
    max_tokens = body.get(limit_name)
    common: dict[str, Any] = {
        "base": BaseRef(
            Path(location["base"]),
            bool(location.get("quantized")),
            str(location.get("base_sha256", "")),
        ),
        "adapter": AdapterRef(Path(location["adapter"]), str(location["sha256"]))
        if location.get("adapter")
        else None,
        "user": str(location.get("user", "")),
        "max_tokens": None
        if max_tokens is None
        else parse_integer(max_tokens, limit_name, 1, 1_000_000),
        "temperature": parse_number(body.get("temperature"), "temperature", 0.0, 2.0, default=1.0),
        "top_p": parse_number(body.get("top_p"), "top_p", 0.0, 1.0, default=1.0),
        "seed": None
        if body.get("seed") is None
        else parse_integer(body["seed"], "seed", -(2**63), 2**63 - 1),
        "stop": parse_stop_sequences(body.get("stop")),
        "needs_logprobs": body.get("prompt_logprobs") is not None,
    }
    if chat:
        messages = parse_messages(body.get("messages"))
        return [GenerationRequest(messages=messages, **parse_tool_fields(body), **common)]
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(text, str) for text in prompts)
    ):
        raise InvalidField("prompt must be a string or a list of strings.", "prompt")
    return [GenerationRequest(prompt=text, **common) for text in prompts]


def check_fields(body: dict[str, Any], supported: Collection[str]) -> None:
    """Raises InvalidField: a field that is not supported has a value that would change the
    answer.
    """
    for name, value in body.items():
        if value is None or name in supported or name in IGNORED_FIELDS:
            continue
        is_neutral = value in NEUTRAL_VALUES.get(name, ())
        # With prompt_logprobs the conversation is complete; vLLM needs add_generation_prompt false
        is_neutral |= name == "add_generation_prompt" and body.get("prompt_logprobs") is not None
        if is_neutral:
            continue
        accepted = NEUTRAL_VALUES.get(name)
        problem = (
            f"must be {json.dumps(accepted[0])}; other values are not supported."
            if accepted
            else "is not supported. Leave it out."
        )
        raise InvalidField(f"{name[:80]} {problem}", name[:80])
    for name in ("stream", "parallel_tool_calls"):
        if body.get(name) is not None and not isinstance(body[name], bool):
            raise InvalidField(f"{name} must be true or false.", name)


def parse_tool_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The request's fields about tools. With `tool_choice` none, the model does not see them.

    Raises:
        InvalidField: a tool is invalid, or the choice is none of the tools.
    """
    tools, choice = parse_tools(body.get("tools")), body.get("tool_choice")
    max_calls = 1 if body.get("parallel_tool_calls") is False else None
    if choice in (None, "auto"):
        return {"tools": tools, "max_calls": max_calls}
    if choice == "none":
        return {}
    names = [tool["function"]["name"] for tool in tools]
    function = choice.get("function") if isinstance(choice, dict) else None
    forced = function.get("name") if isinstance(function, dict) else None
    if choice == "required" and names:
        return {"tools": tools, "forced_tool": "", "max_calls": max_calls}
    if isinstance(choice, dict) and choice.get("type") == "function" and forced in names:
        return {"tools": tools, "forced_tool": forced, "max_calls": 1}
    raise InvalidField(
        "tool_choice must be none, auto, required, or "
        '{"type": "function", "function": {"name": ...}} with the name of one of the tools.',
        "tool_choice",
    )


def parse_tools(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidField(f"tools must be a list of at most {MAX_TOOLS} tools.", "tools")
    return [parse_tool(tool, index) for index, tool in enumerate(value)]


def parse_tool(tool: Any, index: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise InvalidField(
            f'tools[{index}] must be {{"type": "function", "function": {{...}}}}.', "tools"
        )
    if not is_tool_name(function.get("name")):
        raise InvalidField(f"tools[{index}].function needs a name.", "tools")
    if not isinstance(function.get("parameters") or {}, dict):
        raise InvalidField(f"The parameters of tools[{index}] must be an object.", "tools")
    if not isinstance(function.get("description") or "", str):
        raise InvalidField(f"The description of tools[{index}] must be text.", "tools")
    known = {key: item for key, item in function.items() if item is not None and key != "strict"}
    # Many chat templates fail without these two
    known["description"] = known.get("description") or ""
    known["parameters"] = known.get("parameters") or {"type": "object", "properties": {}}
    return {"type": "function", "function": known}


def is_tool_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_TOOL_NAME_LENGTH


def parse_messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidField("messages must be a list with at least one message.", "messages")
    return [parse_message(message, index) for index, message in enumerate(value)]


def parse_message(message: Any, index: int) -> dict[str, Any]:
    """A message as the chat template gets it: tool calls with their arguments as objects.

    Raises:
        InvalidField: a key is wrong or not supported.
    """
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidField(
            f"messages[{index}] needs a role, one of {', '.join(ROLES)}.", "messages"
        )
    known_fields = {
        key: value
        for key, value in message.items()
        if value is not None and key not in IGNORED_MESSAGE_KEYS
    }
    for key in known_fields:
        if key not in MESSAGE_KEYS[role]:
            raise InvalidField(
                f"{key[:80]} of messages[{index}] is not supported for the role {role}. Leave it "
                "out.",
                "messages",
            )
    for key in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(known_fields.get(key, ""), str):
            raise InvalidField(f"{key} of messages[{index}] must be text.", "messages")
    calls = parse_tool_calls(known_fields.pop("tool_calls", []), index)
    content = (
        ""
        if calls and "content" not in known_fields
        else parse_content(known_fields.get("content"), index)
    )
    return {
        **known_fields,
        "role": "system" if role == "developer" else role,
        "content": content,
        **({"tool_calls": calls} if calls else {}),
    }


def parse_content(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidField(
            f"The content of messages[{index}] must be text or a list of text parts.", "messages"
        )
    for position, part in enumerate(content):
        if (
            not isinstance(part, dict)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise InvalidField(
                f'messages[{index}].content[{position}] must be {{"type": "text", "text": "..."}}. '
                "Only text is supported.",
                "messages",
            )
    return "".join(part["text"] for part in content)


def parse_tool_calls(value: Any, index: int) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer. OpenAI sends the arguments as JSON text; chat templates get
    the object.
    """
    if not isinstance(value, list):
        raise InvalidField(f"tool_calls of messages[{index}] must be a list.", "messages")
    return [
        parse_tool_call(call, f"tool_calls[{position}] of messages[{index}]")
        for position, call in enumerate(value)
    ]


def parse_tool_call(call: Any, location: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise InvalidField(f"{location} must be a call of a function.", "messages")
    name, arguments = function.get("name"), function.get("arguments")
    if not is_tool_name(name):
        raise InvalidField(f"{location} needs function.name.", "messages")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}", f"function.arguments of {location}")
        except InvalidInput:
            arguments = None
    if not isinstance(arguments, dict):
        raise InvalidField(f"function.arguments of {location} must be a JSON object.", "messages")
    call_id = call.get("id")
    if not isinstance(call_id, str | None):
        raise InvalidField(f"id of {location} must be text.", "messages")
    known_id = {} if call_id is None else {"id": call_id}
    return {**known_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_stop_sequences(value: Any) -> tuple[str, ...]:
    sequences = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(sequences, list)
        or len(sequences) > MAX_STOP_SEQUENCES
        or not all(
            isinstance(sequence, str) and 0 < len(sequence) <= MAX_STOP_CHARACTERS
            for sequence in sequences
        )
    ):
        raise InvalidField(
            f"stop must be a string or a list of at most {MAX_STOP_SEQUENCES} strings, of at most "
            f"{MAX_STOP_CHARACTERS} characters each.",
            "stop",
        )
    return tuple(sequences)


def parse_number(
    value: Any, name: str, low: float, high: float, *, default: float | None = None
) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidField(f"{name} must be a number from {low:,.15g} to {high:,.15g}.", name)
    return value


def parse_integer(value: Any, name: str, low: int, high: int) -> int:
    number = parse_number(value, name, low, high)
    if number != int(number):
        raise InvalidField(f"{name} must be a whole number.", name)
    return int(number)


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

    def build_chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None
    ) -> dict[str, Any]:
        """A chunk with what is new: the keys of a chat's message, or the `text` of a completion."""
        content = {"delta": delta} if self.chat else {"text": "", **delta}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return {
            **self.common_fields,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "choices": [choice],
        }

    def build_role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat, with the role."""
        return self.build_chunk(index, {"role": "assistant", "content": ""}, None)

    def build_event_chunk(self, index: int, event: StreamEvent) -> dict[str, Any]:
        """A chunk with the new text, reasoning or tool call."""
        if "tool_call" in event:
            calls = [{"index": event["index"], **event["tool_call"]}]
            return self.build_chunk(index, {"tool_calls": calls}, None)
        if "reasoning" in event:
            return self.build_chunk(index, {"reasoning_content": event["reasoning"]}, None)
        return self.build_chunk(index, {"content" if self.chat else "text": event["text"]}, None)

    def build_extra_chunk(self, **fields: Any) -> dict[str, Any]:
        """A chunk without choices: the loading status, or the usage at the end."""
        return {**self.build_chunk(0, {}, None), "choices": [], **fields}

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
        content = {"message": build_message(text, events)} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": events[-1]["done"]}


def build_message(text: str, events: list[StreamEvent]) -> dict[str, Any]:
    """The assistant's message. Its content is null if it only has tool calls."""
    reasoning = "".join(event.get("reasoning", "") for event in events)
    calls = [event["tool_call"] for event in events if "tool_call" in event]
    return {
        "role": "assistant",
        "content": None if calls and not text else text,
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


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
