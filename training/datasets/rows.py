"""Training rows: a conversation or plain text, validated field by field. No files, row formats or
ORM here.

A message is stored in OpenAI's form: `role`, `content`, `name`, `tool_calls` with `id`,
`tool_call_id`, `reasoning_content`, and `"weight": 0` for an assistant message that is not trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.datasets.errors import BadRow
from training.datasets.values import (
    SourceFloat,
    parse_nested,
    remove_nulls,
    remove_schema_nulls,
)
from training.text_input import UNSTORABLE

ROLES = ("system", "user", "assistant", "tool")
# Other names of the roles: OpenAI's newer and older ones, ShareGPT's, OpenAssistant's
ROLE_ALIASES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's turn with one call or a list of calls
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
# Keys that say whether a message is trained: OpenAI's, Axolotl's and LLaMA-Factory's
WEIGHT_KEYS = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
ASSISTANT_KEYS = ("tool_calls", "function_call", *REASONING_KEYS)
MESSAGE_KEYS = frozenset(
    (*ROLE_KEYS, *CONTENT_KEYS, *WEIGHT_KEYS, *ASSISTANT_KEYS, "name", "tool_call_id")
)
TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
EXCHANGE_KEYS = {"system", "input", "output"}
# Keys of content parts, calls and functions that are used. `index` is the position of a call.
PART_KEYS = ("type", "text", "thinking")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # the first is OpenAI's
CALL_KEYS = frozenset(("id", "type", "function", "index", "name"))
TEXT_PART_TYPES = ("text", "input_text", "output_text")
SPLITS = {"train": "Training", "eval": "Held out", "test": "Test"}
# Other names of the splits in files
SPLIT_ALIASES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "val": "eval",
    "valid": "eval",
    "validation": "eval",
    "dev": "eval",
    "heldout": "eval",
}
MAX_ROW_BYTES = 4 * 2**20
MAX_NAME_LENGTH = 128  # of a function; OpenAI's limit is 64
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Either `messages` (with the `tools` they may call) or `text`."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    split: str = ""  # train, eval, test, or empty: assigned when the version is built
    unused: frozenset[str] = frozenset()  # columns and message keys with a value that is not used

    def to_json(self) -> str:
        if self.text:
            return json.dumps({"text": self.text}, ensure_ascii=False)
        tools = {"tools": list(self.tools)} if self.tools else {}
        return json.dumps({"messages": list(self.messages), **tools}, ensure_ascii=False)

    def with_unused(self, *names: str) -> Row:
        return replace(self, unused=self.unused.union(names)) if names else self


def is_message(value: Any) -> bool:
    """Whether a value looks like a message: an object with a role."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(value.get(key), str) for key in ROLE_KEYS)
        and any(key in value for key in (*CONTENT_KEYS, *ASSISTANT_KEYS))
    )


def is_exchange(value: Any) -> bool:
    """Whether a value is a question with its answer, as in XTuner's and Capybara's data."""
    return isinstance(value, Mapping) and {"input", "output"} <= value.keys() <= EXCHANGE_KEYS


def split_exchange(exchange: Mapping[str, Any]) -> list[Message]:
    return [
        {"role": role, "content": exchange[key]}
        for key, role in (("system", "system"), ("input", "user"), ("output", "assistant"))
        if not is_missing(exchange.get(key))
    ]


def belongs_to_conversation(message: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether the items of an array are one conversation: their roles are known, and they do not
    differ in another key, such as the id of the conversation.
    """
    role = str(message.get("role") or message.get("from")).strip().lower()
    keys = (message.keys() | first.keys()) - MESSAGE_KEYS
    return (role in ROLE_ALIASES or role in CALL_ROLES) and all(
        message.get(key) == first.get(key) for key in keys
    )


def get_role(message: Any) -> str:
    """The role of a message under any of its names, or an empty text."""
    sender = next((message.get(key) for key in ROLE_KEYS if message.get(key)), "")
    return ROLE_ALIASES.get(str(sender).strip().lower(), "")


def parse_turns(value: Any) -> Any:
    """A list of messages. Older versions of `datasets` store it as an object of lists."""
    value = parse_nested(value)
    if isinstance(value, list) and value and all(is_exchange(item) for item in value):
        return [message for exchange in value for message in split_exchange(exchange)]
    if isinstance(value, Mapping):
        columns = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        lengths = {len(inner) for inner in columns.values()}
        is_complete = len(columns) == len(value)  # else a value would be lost
        if is_complete and ({"role", "from"} & columns.keys()) and len(lengths) == 1:
            return [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
    return value


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def build_row(messages: Any, tools: Any = None, *, field: str = "messages", split: str = "") -> Row:
    """Validate OpenAI or ShareGPT messages: the system message comes first, and an assistant
    message is trained.

    Raises:
        BadRow: names the message and its field.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"`{field}` must be a list with at least one message")
    checked_tools, unused = check_tools(tools), set[str]()
    checked_messages = tuple(
        check_message(message, position, checked_tools, field, unused)
        for position, message in enumerate(messages, start=1)
    )
    answers = [message for message in checked_messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow(f"`{field}` has no assistant message to train on")
    if len(checked_messages) == 1:
        raise BadRow(f"`{field}` has no message before the assistant's, so nothing can be trained")
    if all(message.get("weight") == 0 for message in answers):
        raise BadRow(f"every assistant message in `{field}` is masked, so nothing can be trained")
    if any(message["role"] == "system" for message in checked_messages[1:]):
        raise BadRow("the `system` message must come first")
    return Row(checked_messages, checked_tools, split=split, unused=frozenset(unused))


def check_message(
    message: Any,
    position: int,
    tools: tuple[dict[str, Any], ...],
    field: str,
    unused: set[str],
) -> Message:
    """The message in the form that is stored. Adds the keys that are not used to `unused`."""
    if not isinstance(message, Mapping):
        raise BadRow(
            f"message {position} must be an object with `role` and `content`",
            group="a message is not an object",
        )
    prefix = f"message {position}: "
    role_key = next((key for key in ROLE_KEYS if message.get(key) is not None), "role")
    sender = message.get(role_key)
    default_key = "value" if role_key == "from" else "content"
    content_key = next((key for key in CONTENT_KEYS if message.get(key) is not None), default_key)
    content, used = message.get(content_key), {role_key, content_key}
    if isinstance(sender, str) and sender.strip().lower() in CALL_ROLES:
        role, calls, content = "assistant", parse_call_turn(content, position), None
    else:
        role, calls = parse_role(sender, role_key, prefix), None
    reasoning = ""
    if role == "assistant":
        if calls is None:
            calls = find_calls(message, position)
            used.update(("tool_calls", "function_call"))
        reasoning, content = take_reasoning(message, content, prefix, used)
    unused_in_calls: set[str] = set()
    checked_calls = check_tool_calls(calls, position, tools, unused_in_calls)
    content = join_text_parts(content, prefix)
    is_content_optional = bool(checked_calls or reasoning)
    text = (
        "" if content is None and is_content_optional else check_text(content, content_key, prefix)
    )
    checked: Message = {"role": role, "content": text}
    if role == "assistant" and not checked_calls and not text.strip():
        raise BadRow(
            f"{prefix}`content` of the assistant is empty",
            group="`content` of the assistant is empty",
        )
    for key in ("name", "tool_call_id") if role == "tool" else ("name",):
        if isinstance(message.get(key), str | int) and message[key] != "":
            checked[key] = check_text(message[key], key, prefix)
            used.add(key)
    if reasoning:
        checked["reasoning_content"] = reasoning
    if checked_calls:
        checked["tool_calls"] = checked_calls
    if role == "assistant" and not is_trained(message, prefix):
        checked["weight"] = 0
    used.update(WEIGHT_KEYS if role == "assistant" else list_ignored_weight_keys(message, prefix))
    unused.update(
        f"{field}[].{key}"
        for key, value in message.items()
        if key not in used and not is_missing(value)
    )
    unused.update(f"{field}[].{key}" for key in (*list_unused_part_keys(message), *unused_in_calls))
    return checked


def list_unused_part_keys(message: Mapping[str, Any]) -> set[str]:
    """The keys inside of a message's content parts that are not used."""
    return {
        f"{key}[].{name}"
        for key in CONTENT_KEYS
        for part in (message[key] if isinstance(message.get(key), list) else ())
        if isinstance(part, Mapping)
        for name, value in part.items()
        if name not in PART_KEYS and not is_missing(value)
    }


def parse_role(sender: Any, role_key: str, prefix: str) -> str:
    role = ROLE_ALIASES.get(sender.strip().lower()) if isinstance(sender, str) else None
    if role is None:
        raise BadRow(
            f"{prefix}`{role_key}` is {shorten_value(sender)}; expected system, user, assistant or "
            "tool",
            group=f"`{role_key}` is not one of system, user, assistant or tool",
        )
    return role


def is_trained(message: Mapping[str, Any], prefix: str) -> bool:
    """False if a key masks the message, such as OpenAI's `"weight": 0`."""
    return all(parse_weight(message.get(key), key, prefix, default=True) for key in WEIGHT_KEYS)


def list_ignored_weight_keys(message: Mapping[str, Any], prefix: str) -> list[str]:
    """The keys that mask a message of another role, which is never trained. A weight of 1 there is
    listed as unused.
    """
    return [
        key for key in WEIGHT_KEYS if not parse_weight(message.get(key), key, prefix, default=False)
    ]


def parse_weight(value: Any, key: str, prefix: str, *, default: bool) -> bool:
    """Raises BadRow: the value is neither 0, 1, true nor false."""
    if is_missing(value):
        return default
    if isinstance(value, str) and value.strip().lower() in TRUTH_VALUES:
        return TRUTH_VALUES[value.strip().lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(
        f"{prefix}`{key}` is {shorten_value(value)}; expected 0 or 1",
        group=f"`{key}` is not 0 or 1",
    )


def take_reasoning(
    message: Mapping[str, Any], content: Any, prefix: str, used: set[str]
) -> tuple[str, Any]:
    """The reasoning of an assistant message, from a key of its own or from content parts, and the
    content without it.
    """
    reasoning = ""
    for key in REASONING_KEYS:
        value = message.get(key)
        if is_missing(value):
            continue
        text = check_text(join_text_parts(value, prefix), key, prefix)
        if not reasoning or text == reasoning:
            reasoning = text
            used.add(key)
    if not reasoning and isinstance(content, list):
        parts = [
            part["thinking"]
            for part in content
            if isinstance(part, Mapping)
            and part.get("type") == "thinking"
            and isinstance(part.get("thinking"), str)
        ]
        if parts:
            reasoning = check_text("".join(parts), "thinking", prefix)
            content = [part for part in content if part.get("type") != "thinking"] or None
    return reasoning if reasoning.strip() else "", content


def join_text_parts(content: Any, prefix: str = "") -> Any:
    """OpenAI's list of text parts joined into one text; any other value unchanged."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {
            str(part.get("type") or ("text" if "text" in part else next(iter(part), "text")))
            for part in content
        } - {*TEXT_PART_TYPES}
        if kinds:
            kind = sorted(kinds)[0]
            raise BadRow(
                f"{prefix}`content` has a part of type `{kind[:40]}`; only text is supported",
                group="`content` is not only text",
            )
        return "".join(check_text(part.get("text"), "text", prefix) for part in content)
    return content


def parse_call_turn(content: Any, position: int) -> list[Any]:
    """The calls of ShareGPT's `function_call` turn: an object, or a list of them."""
    calls = parse_nested(content)
    if isinstance(calls, str) or is_missing(calls):
        raise BadRow(
            f"message {position}: the tool call is not JSON",
            group="a `function_call` turn is not JSON",
        )
    calls = calls if isinstance(calls, list) else [calls]
    return [
        call if isinstance(call, Mapping) and "function" in call else {"function": call}
        for call in calls
    ]


def find_calls(message: Mapping[str, Any], position: int) -> Any:
    """The calls of an OpenAI message, also from the older `function_call`."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if is_missing(legacy) or legacy in ("none", "auto", "null"):
        return calls
    if not is_missing(calls):
        raise BadRow(
            f"message {position} has both `tool_calls` and `function_call`; keep one",
            group="a message has both `tool_calls` and `function_call`",
        )
    return [{"function": parse_nested(legacy)}]


def check_tool_calls(
    calls: Any, position: int, tools: tuple[dict[str, Any], ...], unused: set[str]
) -> list[dict[str, Any]]:
    """Validate tool calls and parse their arguments to objects: OpenAI sends them as text, but chat
    templates expect objects. Adds the keys that are not used to `unused`.
    """
    calls = parse_nested(calls)
    if is_missing(calls):
        return []
    if not isinstance(calls, list):
        raise BadRow(
            f"message {position}: `tool_calls` must be a list", group="`tool_calls` is not a list"
        )
    schemas = {tool["function"].get("name"): tool["function"].get("parameters") for tool in tools}
    checked = [check_tool_call(parse_nested(call), position, schemas, unused) for call in calls]
    check_text(to_json_text(checked, "tool_calls"), "tool_calls", f"message {position}: ")
    return checked


def check_tool_call(
    call: Any, position: int, schemas: Mapping[str, Any], unused: set[str]
) -> dict[str, Any]:
    """One call in OpenAI's form. Its arguments may be beside the function."""
    call = call if isinstance(call, Mapping) else {}
    function = parse_nested(call["function"]) if "function" in call else call
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise BadRow(
            f"message {position}: a tool call has no `function.name`",
            group="a tool call has no `function.name`",
        )
    if len(name) > MAX_NAME_LENGTH:
        raise BadRow(
            f"message {position}: the name of a tool call has more than {MAX_NAME_LENGTH} "
            "characters",
            group="the name of a tool call is too long",
        )
    owner, key = next(
        (
            (owner, key)
            for owner in (function, call)
            for key in ARGUMENT_KEYS
            if owner.get(key) is not None
        ),
        (function, ARGUMENT_KEYS[0]),
    )
    arguments = parse_arguments(owner.get(key), schemas.get(name))
    if not isinstance(arguments, dict):
        raise BadRow(
            f"message {position}: `{key}` of `{name[:40]}` are not a JSON object",
            group="the arguments of a tool call are not a JSON object",
        )
    unused |= {
        f"tool_calls[].{other}"
        for values in (call, function)
        for other, value in values.items()
        if not (other in CALL_KEYS or is_missing(value) or (values is owner and other == key))
    }
    call_id = {} if is_missing(call.get("id")) else {"id": str(call["id"])}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_arguments(arguments: Any, schema: Any) -> Any:
    """The arguments of a call as an object, or what they are if they are none."""
    if isinstance(arguments, str):
        return {} if arguments.strip() in ("", "null") else parse_nested(arguments)
    if is_missing(arguments):  # also an empty map of Arrow
        return {}
    return remove_nulls(arguments, schema)


def check_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Validate tools. A bare function (OpenAI's older `functions`) becomes a tool."""
    is_text = isinstance(tools, str)
    tools = parse_nested(tools)
    if is_missing(tools):
        return ()
    tools = [tools] if isinstance(tools, dict) else tools
    tools = [parse_nested(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("`tools` must be a list of objects")
    if not is_text:  # Arrow adds no nulls to JSON that is stored as text
        tools = remove_schema_nulls(tools)
    tools = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
        for tool in tools
    ]
    check_text(to_json_text(tools, "tools"), "tools")
    return tuple(tools)


def to_json_text(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(
            f"`{field}` holds a value that JSON does not support ({error})",
            group=f"`{field}` holds a value that JSON does not support",
        ) from error


def check_text(value: Any, field: str, prefix: str = "") -> str:
    """Validate text that can be stored and encoded. Numbers and booleans are converted to JSON's
    text, since labels are often 0 and 1, or true and false.

    Raises:
        BadRow: missing, not text, or not encodable as UTF-8.
    """
    if isinstance(value, SourceFloat):
        return value.text
    if isinstance(value, int | float):  # also true and false
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadRow(
            f"{prefix}`{field}` is {shorten_value(value)}; expected text",
            group=f"`{field}` is missing or not text",
        )
    match = UNSTORABLE.search(value)
    if match is None:
        return value
    position = match.start() + 1
    if match[0] == "\0":
        problem, group = "holds a NUL character", "holds a NUL character"
    elif "\udc80" <= match[0] <= "\udcff":  # a byte that was not valid UTF-8
        problem = f"is not UTF-8 at character {position}; save the file as UTF-8"
        group = "is not UTF-8"
    else:
        problem = group = "holds half of a surrogate pair (such as \\ud800)"
    raise BadRow(f"{prefix}`{field}` {problem}", group=f"`{field}` {group}")


def find_split(name: str) -> str:
    """The split that the name of a file, a folder or a key names by a whole word: `train_sft`,
    `my-test.jsonl`. Empty if there is none, or more than one.
    """
    splits = {
        SPLIT_ALIASES[word]
        for word in re.split("[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
        if word in SPLIT_ALIASES
    }
    return splits.pop() if len(splits) == 1 else ""


def check_split(value: Any) -> str:
    if value in (None, ""):
        return ""
    split = SPLIT_ALIASES.get(value.strip().lower(), "") if isinstance(value, str) else ""
    if not split:
        raise BadRow(
            f"`split` is {shorten_value(value)}; expected train, valid or test",
            group="`split` is not train, valid or test",
        )
    return split


def shorten_value(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        if not value:
            return "empty"
        return f"`{value[:40]}…`" if len(value) > 40 else f"`{value}`"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:40] + "…"
