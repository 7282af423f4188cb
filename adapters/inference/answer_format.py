"""How a model writes reasoning and tool calls, taken from its chat template, and how they are read
from an answer. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from training.text_input import InvalidInput, check_value, clean_value

# Closing tags of reasoning: </think>, [/THINK], </seed:think>, <|END_THINKING|>, and the like
THINK_END_PATTERN = re.compile(
    r"</(?:\w+:)?(?:think\w*|reason\w*|thought\w*)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷"
)
# gpt-oss writes reasoning, calls and the answer as channels; these tags are not part of their text
HARMONY_TAGS = ("<|channel|>analysis<|message|>", "<|end|>")
HARMONY_CHANNEL_TAGS = (
    "<|start|>assistant",
    "<|channel|>final",
    "<|channel|>commentary",
    "<|message|>",
    "<|end|>",
)
XML_OPENING_PATTERN = re.compile(r"\s*<function=([^>\s]+)>")
XML_CLOSING = "</function>"
XML_PARAMETER_PATTERN = re.compile(
    r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", re.DOTALL
)
NAME_PATTERN = re.compile(r"\s*([\w.:/-]+)")
MAX_NAME_TO_ARGUMENTS = 80  # characters between a function's name and its arguments
ID_LENGTH = 9  # Mistral's templates accept ids of exactly nine letters and digits
# strict=False: models write line breaks in strings
DECODER = json.JSONDecoder(strict=False)
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
ToolCall = dict[str, Any]


@dataclass(frozen=True)
class CallFormat:
    """How a chat template writes a tool call.

    `opening` comes before a call (`<tool_call>`) and `closing` after it; both are empty if a call
    is bare JSON. `kind` is "object" if name and arguments are in one JSON object, "named" if the
    arguments follow the name, and "xml" for `<function=name>` with parameters or JSON in it.
    `before_name` and `before_arguments` are the text that the template writes there.
    `section_opening` and `section_closing` are around all calls of an answer.
    """

    kind: str
    opening: str
    closing: str
    before_name: str
    before_arguments: str
    section_opening: str = ""
    section_closing: str = ""

    @property
    def start_tag(self) -> str:
        """What comes before the first call: the section's opening and the call's."""
        end = self.before_name.rfind(self.opening) + len(self.opening)
        return self.before_name[:end].lstrip() or self.first_text

    @property
    def first_text(self) -> str:
        """The text that every call starts with."""
        return self.opening or ("<function=" if self.kind == "xml" else "{")

    def get_prefix(self, name: str) -> str:
        """The start of a call of this function, or of any function if the name is empty."""
        if not name:
            return self.before_name
        return f"{self.before_name}{name}{self.before_arguments}".rstrip(" ")


@dataclass(frozen=True)
class AnswerFormat:
    """What to look for in the answer to one request.

    `reasoning_tags` are the opening and closing tag of reasoning, or None. `prefix` is the start of
    the answer that the prompt already ends with.
    """

    reasoning_tags: tuple[str, str] | None = None
    is_reasoning: bool = False  # the prompt has opened the reasoning
    calls: CallFormat | None = None
    tools: tuple[dict[str, Any], ...] = ()
    prefix: str = ""
    max_calls: int | None = None

    @property
    def channel_tags(self) -> tuple[str, ...]:
        """Tags around the text of an answer, which are removed."""
        return HARMONY_CHANNEL_TAGS if self.reasoning_tags == HARMONY_TAGS else ()

    @property
    def tags(self) -> list[str]:
        """The texts that must not be dropped as special tokens."""
        tags = [*(self.reasoning_tags or ()), *self.channel_tags]
        if self.calls is None:
            return tags
        around = [self.calls.before_name, self.calls.closing, self.calls.section_closing]
        return [*tags, *around, self.calls.before_arguments]


@dataclass
class ParsedAnswer:
    """What can be sent of an answer so far; each part only grows with more text."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def find_reasoning_tags(template: str) -> tuple[str, str] | None:
    """The tags around reasoning in a chat template."""
    if HARMONY_TAGS[0] in template:
        return HARMONY_TAGS
    match = THINK_END_PATTERN.search(template)
    if match is None:
        return None
    closing = match[0]
    return closing.replace("/", "").replace("END_", "START_"), closing


def is_reasoning_open(prompt: str, tags: tuple[str, str]) -> bool:
    """Whether the prompt ends with an opening tag, so that the answer starts with reasoning."""
    return prompt.rstrip().endswith(tags[0])


def parse_answer(text: str, answer_format: AnswerFormat, *, is_final: bool) -> ParsedAnswer:
    """Split an answer into reasoning, text and tool calls. Text that may become a tag or a call is
    left out until the answer `is_final`; what is no call then is text.
    """
    reasoning, rest = split_reasoning(text, answer_format, is_final=is_final)
    for tag in answer_format.channel_tags:
        rest = rest.replace(tag, "")
    if not is_final:
        rest = hold_back(rest, answer_format.channel_tags)
    if answer_format.calls is None:
        return ParsedAnswer(reasoning, rest)
    content, calls = split_calls(rest, answer_format, is_final=is_final)
    return ParsedAnswer(reasoning, content, calls[: answer_format.max_calls])


def split_reasoning(text: str, answer_format: AnswerFormat, *, is_final: bool) -> tuple[str, str]:
    """The reasoning at the start of an answer, and the rest."""
    if answer_format.reasoning_tags is None:
        return "", text
    opening, closing = answer_format.reasoning_tags
    stripped = text.lstrip()
    if not stripped.startswith(opening) and not answer_format.is_reasoning:
        may_open = not is_final and opening.startswith(stripped)
        return "", "" if may_open else text
    if not is_final and opening.startswith(stripped):
        return "", ""
    reasoning, tag, rest = stripped.removeprefix(opening).partition(closing)
    if tag or is_final:
        return reasoning.strip(), rest.lstrip()
    return hold_back(reasoning, (closing,)).strip(), ""


def split_calls(
    text: str, answer_format: AnswerFormat, *, is_final: bool
) -> tuple[str, list[ToolCall]]:
    """The text of an answer without its tool calls, and these."""
    call_format = answer_format.calls
    assert call_format is not None, "only for requests with tools"
    tag = call_format.first_text
    parts: list[str] = []
    calls: list[ToolCall] = []
    position = searched = 0
    while (start := text.find(tag, searched)) >= 0:
        parsed = read_calls(text, start, answer_format)
        before = clean_between(text[position:start], calls)
        if call_format.section_opening:
            before = before.rstrip().removesuffix(call_format.section_opening)
        if not call_format.opening:
            before = before.rstrip().removesuffix("[")
        if parsed:
            parts.append(before)
            calls += parsed[0]
            position = searched = parsed[1]
        elif is_final or is_no_call(text, start, call_format):
            searched = start + len(tag)
        else:
            return "".join([*parts, before]).rstrip(), calls
    rest = text[position:]
    if not is_final:
        closings = (call_format.closing, call_format.section_closing)
        rest = hold_back(rest, (tag, call_format.start_tag, *closings)).rstrip()
        if not call_format.opening:  # perhaps the start of a list of calls
            rest = rest.removesuffix("[").rstrip()
    content = "".join([*parts, clean_between(rest, calls)])
    return content.rstrip() if calls or not is_final else content, calls


def clean_between(text: str, calls: Collection[ToolCall]) -> str:
    """The text after a call, without what only separates two calls."""
    return "" if calls and not text.strip(" \t\n;,]") else text


def is_no_call(text: str, start: int, call_format: CallFormat) -> bool:
    """Whether the text from `start` on is no call, whatever follows."""
    if call_format.kind == "xml":
        return False
    rest = text[start + len(call_format.opening) :].lstrip()
    if call_format.kind == "named" or not rest:
        return False
    try:
        DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        # Only an object can be a call, and it starts with a key
        return not re.match(r"\[?\s*(\{\s*(\"|$)|$)", rest)
    return True


def read_calls(
    text: str, start: int, answer_format: AnswerFormat
) -> tuple[list[ToolCall], int] | None:
    """The complete calls from `start` on, and where they end. None if there are none."""
    call_format = answer_format.calls
    assert call_format is not None, "only for requests with tools"
    begin = start + len(call_format.opening)
    if call_format.kind == "xml":
        parsed = read_xml_call(text, begin, answer_format.tools)
    elif call_format.kind == "named":
        parsed = read_named_call(text, begin)
    else:
        parsed = read_json_calls(text, begin)
    if parsed is None:
        return None
    calls, end = parsed
    names = {tool["function"]["name"] for tool in answer_format.tools}
    if not call_format.opening and not all(call["function"]["name"] in names for call in calls):
        return None  # without a tag, other JSON looks the same
    for closing in (call_format.closing, call_format.section_closing):
        end = skip_tag(text, end, closing)
    return calls, end


def skip_tag(text: str, start: int, tag: str) -> int:
    """Where the text goes on after `start`: behind the tag, if it comes there after whitespace."""
    begin = len(text) - len(text[start:].lstrip())
    return begin + len(tag) if tag and text.startswith(tag, begin) else start


def read_json_calls(text: str, begin: int) -> tuple[list[ToolCall], int] | None:
    """One call as a JSON object, or a list of them."""
    parsed = decode_json(text, begin)
    if parsed is None:
        return None
    value, end = parsed
    calls = [to_tool_call(item) for item in (value if isinstance(value, list) else [value])]
    complete = [call for call in calls if call is not None]
    return (complete, end) if complete and len(complete) == len(calls) else None


def read_named_call(text: str, begin: int) -> tuple[list[ToolCall], int] | None:
    """A name, a separator, and the arguments as JSON."""
    match = NAME_PATTERN.match(text, begin)
    if match is None:
        return None
    start = text.find("{", match.end(), match.end() + MAX_NAME_TO_ARGUMENTS)
    parsed = decode_json(text, start) if start >= 0 else None
    if parsed is None:
        return None
    call = to_tool_call({"name": match[1], "arguments": parsed[0]})
    return None if call is None else ([call], parsed[1])


def read_xml_call(
    text: str, begin: int, tools: Collection[dict[str, Any]]
) -> tuple[list[ToolCall], int] | None:
    """`<function=name>` with the arguments as JSON, or with a `<parameter=key>` for each one, whose
    types are in `tools`.
    """
    match = XML_OPENING_PATTERN.match(text, begin)
    if match is None:
        return None
    if text[match.end() :].lstrip().startswith("{"):
        parsed = decode_json(text, match.end())
        end = skip_tag(text, parsed[1], XML_CLOSING) if parsed else 0
        if parsed is None or end == parsed[1]:
            return None
        arguments = parsed[0]
    else:
        inner, closing, _ = text[match.end() :].partition(XML_CLOSING)
        if not closing:
            return None
        arguments = parse_parameters(inner, find_schema(tools, match[1]))
        end = match.end() + len(inner) + len(closing)
    call = to_tool_call({"name": match[1], "arguments": arguments})
    return None if call is None else ([call], end)


def find_schema(tools: Collection[dict[str, Any]], name: str) -> dict[str, Any]:
    """The schema of a function's arguments."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    schema = schemas.get(name)
    return schema if isinstance(schema, dict) else {}


def parse_parameters(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The arguments in `<parameter=key>` tags."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    return {
        key: parse_xml_value(value, list_types(properties.get(key), schema))
        for key, value in XML_PARAMETER_PATTERN.findall(text)
    }


def list_types(schema: Any, root: dict[str, Any]) -> set[str]:
    """The JSON types that a schema allows, also through its alternatives, its values, and its
    references into `root`.
    """
    types: set[str] = set()
    seen: set[str] = set()
    waiting = [schema]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, dict):
            continue
        types |= {name for name in list_items(current.get("type")) if isinstance(name, str)}
        values = [value for key in ("enum", "const") for value in list_items(current.get(key))]
        types |= {JSON_TYPES[type(value)] for value in values if type(value) in JSON_TYPES}
        for key in ("anyOf", "oneOf", "allOf"):
            waiting += list_items(current.get(key))
        reference = str(current.get("$ref", "")).removeprefix("#/")
        section, _, name = reference.partition("/")
        if reference not in seen and isinstance(root.get(section), dict):
            seen.add(reference)  # they may go in circles
            waiting.append(root[section].get(name))
    return types


def list_items(value: Any) -> list[Any]:
    """The items of a list; any other value as the only one, and none if it is null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def parse_xml_value(text: str, types: Collection[str]) -> Any:
    """An argument that may be a string is text; any other is JSON, if it is valid."""
    word = text.strip()
    if "string" in types:
        return None if "null" in types and word == "null" else text
    if "boolean" in types and word in ("True", "False"):
        return word == "True"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def decode_json(text: str, begin: int) -> tuple[Any, int] | None:
    """The JSON value at `begin` or after the whitespace there, and where it ends."""
    start = len(text) - len(text[begin:].lstrip())
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def to_tool_call(value: Any) -> ToolCall | None:
    """A call in OpenAI's format from what a model wrote. None if it is no call."""
    function = value.get("function") if isinstance(value, dict) else None
    source = function if isinstance(function, dict) else value
    if not isinstance(source, dict):
        return None
    name = source.get("name", function)
    arguments = source.get("arguments", source.get("parameters"))
    if isinstance(arguments, str):
        parsed = decode_json(arguments or "{}", 0)
        if parsed is None:
            return None
        arguments = parsed[0]
    arguments = clean_value({} if arguments is None else arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        check_value(arguments, "The arguments")
    except InvalidInput:  # NaN is no JSON, and clients parse numbers up to their limits
        return None
    call_id = value.get("id")
    return {
        "id": clean_value(call_id)
        if isinstance(call_id, str) and call_id
        else uuid4().hex[:ID_LENGTH],
        "type": "function",
        "function": {
            "name": clean_value(name),
            "arguments": json.dumps(arguments, ensure_ascii=False),
        },
    }


def hold_back(text: str, tags: Collection[str]) -> str:
    """The text without an end that may become one of the tags."""
    return text[: len(text) - longest_prefix_at_end(text, tags)]


def longest_prefix_at_end(text: str, tags: Collection[str]) -> int:
    """Length of the longest end of `text` that is the start of a tag."""
    longest = min(max(map(len, tags), default=1) - 1, len(text))
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(len(tag) > size and tag.startswith(end) for tag in tags):
            return size
    return 0
