"""Find out how a chat template writes tool calls, by rendering some. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from adapters.inference.answer_format import (
    XML_CLOSING,
    AnswerFormat,
    CallFormat,
    decode_json,
    parse_answer,
)
from training.engine.data.errors import DataError

TAG_START_PATTERN = re.compile(r"[<\[{◁]")
# The start of a tag that is not closed yet
OPEN_TAG_PATTERN = re.compile(r"[<\[][^<>\[\]\s]*$")
PROBE_QUESTION, PROBE_ID = "probe_question", "a1b2c3d4"
PROBE_NAMES = ("probe_function", "other_function")
PROBE_NAME, PROBE_KEY, PROBE_VALUE = PROBE_NAMES[0], "probe_key", "probe_value"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}

# The text of these messages with these tools
RenderMessages = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]


def find_call_format(
    render: RenderMessages, reasoning_tags: tuple[str, str] | None
) -> CallFormat | None:
    """How the chat template writes a tool call, found by rendering one. None if it drops calls, or
    if the rendered call cannot be read back.

    Raises:
        DataError: the template does not accept tool calls.
    """
    text = render_call(render, reasoning_tags)
    call_format = read_call_format(text)
    if call_format is None or not is_read_back(text, call_format, PROBE_NAMES[:1]):
        return None
    with suppress(DataError):  # many templates reject a second call
        pair = render_call(render, reasoning_tags, PROBE_NAMES)
        separated = separate_calls(pair, call_format)
        if separated and is_read_back(pair, separated, PROBE_NAMES):
            return separated
    return call_format


def render_call(
    render: RenderMessages,
    reasoning_tags: tuple[str, str] | None,
    names: Sequence[str] = PROBE_NAMES[:1],
) -> str:
    """What the template writes for an answer with calls of these functions, from the first
    character in which it differs from an answer of text.
    """
    question = {"role": "user", "content": PROBE_QUESTION}
    calls = [
        {
            "id": f"{PROBE_ID}{index}",
            "type": "function",
            "function": {"name": name, "arguments": {PROBE_KEY: PROBE_VALUE}},
        }
        for index, name in enumerate(names)
    ]
    plain = render([question, {"role": "assistant", "content": PROBE_VALUE}], [PROBE_TOOL])
    full = render(
        [question, {"role": "assistant", "content": "", "tool_calls": calls}], [PROBE_TOOL]
    )
    before, _, turn_end = plain.rpartition(PROBE_VALUE)
    if reasoning_tags:
        # Only in the answer: many system prompts explain the tags
        reasoning_start = before.find(reasoning_tags[0], before.rfind(PROBE_QUESTION))
        if reasoning_start >= 0 and reasoning_tags[1] in before[reasoning_start:]:
            before = before[:reasoning_start]
    start = count_equal_characters(before, full)
    if start < len(before) and (tag := OPEN_TAG_PATTERN.search(full[:start])):
        start = tag.start()  # both texts continue with a tag
    text = full[start:]
    if reasoning_tags:
        reasoning_end = text.find(reasoning_tags[1], 0, text.find(names[0]))
        if reasoning_end >= 0:
            text = text[reasoning_end + len(reasoning_tags[1]) :].lstrip()
    turn_end = turn_end.strip()
    end = text.find(turn_end, text.rfind(PROBE_VALUE)) if turn_end else -1
    return text[:end] if end >= 0 else text


def read_call_format(text: str) -> CallFormat | None:
    """The form of a rendered call. None if there is none, if it starts before the answer, or if
    each call starts with another text because its id comes before its name.
    """
    name_start, key_start = text.find(PROBE_NAME), text.find(PROBE_KEY)
    before_name, name_end = text[: max(0, name_start)], name_start + len(PROBE_NAME)
    is_readable = PROBE_QUESTION not in text and PROBE_ID not in before_name
    if name_start < 0 or key_start < name_start or not is_readable:
        return None
    parameter_start = text.rfind("<parameter=", name_end, key_start)
    arguments_start = parameter_start if parameter_start >= 0 else text.rfind("{", 0, key_start)
    if arguments_start < name_end:
        return None
    before_arguments = text[name_end:arguments_start]
    if before_name.endswith("<function="):
        opening = before_name.removesuffix("<function=").strip()
        closing = text.rpartition(XML_CLOSING)[2].strip()
        return CallFormat("xml", opening, closing, before_name, before_arguments)
    is_object = "{" in before_name
    parsed = decode_json(text, before_name.index("{") if is_object else arguments_start)
    if parsed is None:
        return None
    after = text[parsed[1] :].strip()
    if is_object:
        opening = before_name.partition("{")[0].rstrip("[ \n").lstrip()
        closing = after.removeprefix("]").strip()
        return CallFormat("object", opening, closing, before_name, before_arguments)
    return CallFormat("named", before_name.strip(), after, before_name, before_arguments)


def separate_calls(pair: str, call_format: CallFormat) -> CallFormat | None:
    """The form of one of several calls, from two rendered ones: what only comes before the first
    opens the section of all calls. None if both are in one list, or have nothing around them.
    """
    before_name, kind = call_format.before_name, call_format.kind
    middle = pair[find_call_end(pair, call_format) : pair.find(PROBE_NAMES[1])]
    shared = count_equal_characters(middle[::-1], before_name[::-1])
    if shared < len(before_name):  # a shared end may start inside a tag
        tag_start = TAG_START_PATTERN.search(before_name, len(before_name) - shared)
        shared = len(before_name) - tag_start.start() if tag_start else 0
    section, start = before_name[: len(before_name) - shared], before_name[-shared:]
    if kind == "xml":
        opening = start.removesuffix("<function=").strip()
    else:
        opening = (start.partition("{")[0].rstrip("[ \n") if kind == "object" else start).strip()
    closing = middle[: len(middle) - shared].strip()
    is_separate = shared and (opening or kind == "xml") and call_format.closing.startswith(closing)
    if not is_separate:
        return None
    return replace(
        call_format,
        opening=opening,
        closing=closing,
        section_opening=section.strip(),
        section_closing=call_format.closing.removeprefix(closing).strip(),
    )


def find_call_end(text: str, call_format: CallFormat) -> int:
    """Where the first rendered call ends, without its closing tag."""
    name_end = text.find(PROBE_NAME) + len(PROBE_NAME)
    if call_format.kind == "xml":
        return text.find(XML_CLOSING, name_end) + len(XML_CLOSING)
    parsed = decode_json(text, text.find("{", 0 if call_format.kind == "object" else name_end))
    return parsed[1] if parsed else name_end


def is_read_back(text: str, call_format: CallFormat, names: Sequence[str]) -> bool:
    """Whether these calls are read from their rendered text, and nothing else."""
    tools = tuple({"type": "function", "function": {"name": name}} for name in names)
    answer = parse_answer(text, AnswerFormat(calls=call_format, tools=tools), is_final=True)
    parsed = [(call["function"]["name"], call["function"]["arguments"]) for call in answer.calls]
    return parsed == [(name, json.dumps({PROBE_KEY: PROBE_VALUE})) for name in names]


def count_equal_characters(text: str, other: str) -> int:
    """Length of the start that both texts share."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (mine, its) in pairs if mine != its), min(len(text), len(other)))
