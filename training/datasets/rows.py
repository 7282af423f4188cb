"""A line of JSONL -> a row to train on, or a sentence that says what is wrong with it. It knows no ORM and no files.

Two forms are read: OpenAI messages (`{"messages": [{"role", "content"}, ...]}`) and pairs (`{"prompt", "completion"}`), which
become one user and one assistant message. A `split` of train, valid or test is honoured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from training.errors import UserError

ROLES = ("system", "user", "assistant")
SPLITS = {
    "train": "train",
    "valid": "heldout",
    "validation": "heldout",
    "heldout": "heldout",
    "eval": "heldout",
    "test": "test",
}
MAX_LINE_BYTES = 4 * 2**20


class BadRow(UserError):
    """One line is faulty; the message names the field and the reason, the caller adds the line number."""


@dataclass(frozen=True)
class Row:
    messages: list[dict[str, str]]
    split: str = ""  # train, heldout, test, or empty: to be drawn


def parse_line(line: bytes) -> Row:
    """Check one line.

    Raises:
        BadRow: what is wrong, and what was expected.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"the line has more than {MAX_LINE_BYTES // 2**20} MiB; split the row")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise BadRow("the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise BadRow(f"not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise BadRow("expected a JSON object")
    return Row(messages=read_messages(value), split=read_split(value))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadRow(f"the key `{name[:40]}` stands there twice")
        found[name] = value
    return found


def read_messages(value: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in value:
        return check_messages(value["messages"])
    if "prompt" in value or "completion" in value:
        for name in ("prompt", "completion"):
            if not isinstance(value.get(name), str) or not value[name].strip():
                raise BadRow(f"`{name}` must be text that is not empty")
        pair = (("user", value["prompt"]), ("assistant", value["completion"]))
        return [check_message({"role": role, "content": text}, place) for place, (role, text) in enumerate(pair, start=1)]
    raise BadRow(
        "expected `messages`, or `prompt` and `completion`; found " + (", ".join(map(repr, list(value)[:5])) or "no keys")
    )


def check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("`messages` must be a list with at least one message")
    rows = [check_message(message, place) for place, message in enumerate(messages, start=1)]
    if not any(message["role"] == "assistant" for message in rows):
        raise BadRow("`messages` has no assistant message, so there is nothing to learn")
    if any(message["role"] == "system" for message in rows[1:]):
        raise BadRow("a `system` message must come first")
    return rows


def check_message(message: Any, place: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"message {place} must be an object with `role` and `content`")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"message {place}: `role` is {short(role)}; expected system, user or assistant")
    if not isinstance(content, str):
        raise BadRow(f"message {place}: `content` is {short(content)}; expected text")
    if role == "assistant" and not content.strip():
        raise BadRow(f"message {place}: `content` of the assistant is empty")
    if "\0" in content:
        raise BadRow(f"message {place}: `content` holds a NUL character")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"message {place}: `content` holds half a character (a lone surrogate such as \\ud800)") from error
    return {"role": role, "content": content}


def read_split(value: dict[str, Any]) -> str:
    split = value.get("split", "")
    if split == "":
        return ""
    if not isinstance(split, str) or split not in SPLITS:
        raise BadRow(f"`split` is {short(split)}; expected train, valid or test")
    return SPLITS[split]


def short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "…"
