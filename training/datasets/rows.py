"""Training rows: a conversation or plain text, validated field by field. No files, row formats or
ORM here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import UserError, to_one_line

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older role names
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


class BadRow(UserError):
    """A faulty row. The message names the field and the problem; the caller adds the location.

    `group` is the message without row-specific values, so that equal problems are reported once.
    `is_fatal`: the rows after this one were not read either.
    """

    def __init__(self, message: str, *, group: str = "", is_fatal: bool = False) -> None:
        super().__init__(clean_text(message)[:300])  # column names are untrusted
        self.group = clean_text(group or message)[:160]
        self.is_fatal = is_fatal


def clean_text(text: str) -> str:
    """Text that can be stored and displayed: without control characters and lone surrogates."""
    return to_one_line(text.encode("utf-8", errors="replace").decode())


@dataclass(frozen=True)
class Row:
    """Either `messages` (with the `tools` they may call) or `text`."""

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    split: str = ""  # train, eval, test, or empty: assigned when the version is built

    def to_json(self) -> str:
        if self.text:
            return json.dumps({"text": self.text}, ensure_ascii=False)
        tools = {"tools": list(self.tools)} if self.tools else {}
        return json.dumps({"messages": list(self.messages), **tools}, ensure_ascii=False)


def check_messages(messages: Any, field: str = "messages") -> tuple[dict[str, Any], ...]:
    """Validate OpenAI messages: the system message comes first, and an assistant message exists.

    Raises:
        BadRow: names the message and its field.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"`{field}` must be a list with at least one message")
    rows = tuple(
        check_message(message, position) for position, message in enumerate(messages, start=1)
    )
    if not any(message["role"] == "assistant" for message in rows):
        raise BadRow(f"`{field}` has no assistant message to train on")
    if any(message["role"] == "system" for message in rows[1:]):
        raise BadRow("the `system` message must come first")
    return rows


def check_message(message: Any, position: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(
            f"message {position} must be an object with `role` and `content`",
            group="a message is not an object",
        )
    role = message.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(
            f"message {position}: `role` is {shorten_value(message.get('role'))}; expected system, "
            "user, assistant or tool",
            group="`role` is not one of system, user, assistant or tool",
        )
    calls = check_tool_calls(message.get("tool_calls"), position) if role == "assistant" else []
    content = message.get("content")
    content = "" if content is None and calls else join_text_parts(content)
    checked: dict[str, Any] = {
        "role": role,
        "content": check_text(content, "content", f"message {position}: "),
    }
    if role == "assistant" and not calls and not checked["content"].strip():
        raise BadRow(
            f"message {position}: `content` of the assistant is empty",
            group="`content` of the assistant is empty",
        )
    if calls:
        checked["tool_calls"] = calls
    if role == "tool":
        known = [key for key in ("name", "tool_call_id") if isinstance(message.get(key), str)]
        checked |= {key: check_text(message[key], key, f"message {position}: ") for key in known}
    return checked


def join_text_parts(content: Any) -> Any:
    """OpenAI's list of text parts joined into one text; any other value unchanged."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type")) for part in content} - {"text"}
        if kinds:
            kind = sorted(kinds)[0]
            raise BadRow(
                f"`content` has a part of type `{kind[:40]}`; only text is supported",
                group="`content` is not only text",
            )
        return "".join(str(part.get("text", "")) for part in content)
    return content


def check_tool_calls(calls: Any, position: int) -> list[dict[str, Any]]:
    """Validate tool calls and parse their arguments to objects: OpenAI sends them as text, but chat
    templates expect objects.
    """
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRow(
            f"message {position}: `tool_calls` must be a list", group="`tool_calls` is not a list"
        )
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise BadRow(
                f"message {position}: a tool call has no `function.name`",
                group="a tool call has no `function.name`",
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json_or_none(arguments or "{}")
        if not isinstance(arguments, dict) or len(name) > 100:
            raise BadRow(
                f"message {position}: `arguments` of `{name[:40]}` are not a JSON object",
                group="`arguments` of a tool call are not a JSON object",
            )
        checked.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    check_text(to_json_text(checked, "tool_calls"), "tool_calls", f"message {position}: ")
    return checked


def check_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if tools in (None, "", []):
        return ()
    if isinstance(tools, str):
        tools = parse_json_or_none(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("`tools` must be a list of objects")
    check_text(to_json_text(tools, "tools"), "tools")
    return tuple(tools)


def to_json_text(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # Parquet has dates and decimals
        raise BadRow(
            f"`{field}` holds a value that JSON does not support ({error})",
            group=f"`{field}` holds a value that JSON does not support",
        ) from error


def parse_json_or_none(text: str) -> Any:
    """The parsed JSON of a text field; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_text(value: Any, field: str, prefix: str = "") -> str:
    """Validate text that can be stored and encoded. Numbers are converted to text, since labels are
    often 0 and 1.

    Raises:
        BadRow: missing, not text, or not encodable as UTF-8.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadRow(
            f"{prefix}`{field}` is {shorten_value(value)}; expected text",
            group=f"`{field}` is missing or not text",
        )
    if "\0" in value:
        raise BadRow(
            f"{prefix}`{field}` holds a NUL character", group=f"`{field}` holds a NUL character"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(value[error.start]) <= 0xDCFF:  # a byte that was not valid UTF-8
            message = (
                f"`{field}` is not UTF-8 at character {error.start + 1}; save the file as UTF-8"
            )
            raise BadRow(prefix + message, group=f"`{field}` is not UTF-8") from error
        message = f"`{field}` holds half a character (a lone surrogate such as \\ud800)"
        raise BadRow(prefix + message, group=f"`{field}` holds half a character") from error
    return value


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
