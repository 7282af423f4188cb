"""How a model writes reasoning and tool calls, taken from its chat template, and how they are read
from an answer. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

# Closing tags of reasoning: </think>, [/THINK], </seed:think>, <|END_THINKING|>, and the like
THINK_END_PATTERN = re.compile(
    r"</(?:\w+:)?(?:think\w*|reason\w*|thought\w*)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷"
)
XML_FUNCTION_PATTERN = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
XML_PARAMETER_PATTERN = re.compile(
    r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", re.DOTALL
)
NAME_PATTERN = re.compile(r"\s*([\w.:/-]+)")
MAX_NAME_TO_ARGUMENTS = 80  # characters between a function's name and its arguments
ID_LENGTH = 9  # Mistral's templates accept ids of exactly nine letters and digits
PROBE_NAME, PROBE_KEY, PROBE_VALUE = "probe_function", "probe_key", "probe_value"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}

ToolCall = dict[str, Any]
# The text of these messages with these tools
RenderMessages = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]


@dataclass(frozen=True)
class CallFormat:
    """How a chat template writes a tool call.

    `opening` comes before a call (`<tool_call>`) and `closing` after it; both are empty if a call
    is bare JSON. `kind` is "object" if name and arguments are in one JSON object, "named" if the
    arguments follow the name, and "xml" for `<function=name><parameter=key>`. `before_name` and
    `before_arguments` are the text that the template writes there.
    """

    kind: str
    opening: str
    closing: str
    before_name: str
    before_arguments: str

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
    def marks(self) -> list[str]:
        """The texts that must not be dropped as special tokens."""
        call_marks = [self.calls.before_name, self.calls.closing] if self.calls else []
        middle = [self.calls.before_arguments] if self.calls else []
        return [*(self.reasoning_tags or ()), *call_marks, *middle]


@dataclass
class ParsedAnswer:
    """What can be sent of an answer so far; each part only grows with more text."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def find_reasoning_tags(template: str) -> tuple[str, str] | None:
    """The tags around reasoning in a chat template."""
    match = THINK_END_PATTERN.search(template)
    if match is None:
        return None
    closing = match[0]
    return closing.replace("/", "").replace("END_", "START_"), closing


def is_reasoning_open(prompt: str, tags: tuple[str, str]) -> bool:
    """Whether the prompt ends with an opening tag, so that the answer starts with reasoning."""
    return prompt.rstrip().endswith(tags[0])


def find_call_format(
    render: RenderMessages, reasoning_tags: tuple[str, str] | None
) -> CallFormat | None:
    """How the chat template writes a tool call, found by rendering one. None if it drops calls.

    Raises:
        DataError: the template does not accept tool calls.
    """
    question = {"role": "user", "content": "hi"}
    function = {"name": PROBE_NAME, "arguments": {PROBE_KEY: PROBE_VALUE}}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    plain = render([question, {"role": "assistant", "content": PROBE_VALUE}], [PROBE_TOOL])
    full = render([question, answer], [PROBE_TOOL])
    before, _, turn_end = plain.rpartition(PROBE_VALUE)
    if reasoning_tags and reasoning_tags[1] in before:
        before = before.rpartition(reasoning_tags[0])[0]
    text = full[count_equal_characters(before, full) :]
    if reasoning_tags and reasoning_tags[1] in text:
        text = text.partition(reasoning_tags[1])[2].lstrip()
    text = text.removesuffix(turn_end)
    name_start, key_start = text.find(PROBE_NAME), text.find(PROBE_KEY)
    if name_start < 0 or key_start < name_start:
        return None
    before_name, name_end = text[:name_start], name_start + len(PROBE_NAME)
    if before_name.endswith("<function="):
        opening = before_name.removesuffix("<function=").strip()
        closing = text.rpartition("</function>")[2].strip()
        return CallFormat("xml", opening, closing, before_name, ">\n")
    arguments_start = text.rfind("{", 0, key_start)
    if arguments_start < name_end:
        return None
    is_object = "{" in before_name
    found = decode_json(text, before_name.index("{") if is_object else arguments_start)
    if found is None:
        return None
    after = text[found[1] :].strip()
    before_arguments = text[name_end:arguments_start]
    if is_object:
        opening = before_name.partition("{")[0].rstrip("[ \n")
        closing = after.removeprefix("]").strip()
        return CallFormat("object", opening, closing, before_name, before_arguments)
    return CallFormat("named", before_name.strip(), after, before_name, before_arguments)


def count_equal_characters(text: str, other: str) -> int:
    """Length of the start that both texts share."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (mine, its) in pairs if mine != its), min(len(text), len(other)))


def parse_answer(text: str, answer_format: AnswerFormat, *, is_final: bool) -> ParsedAnswer:
    """Split an answer into reasoning, text and tool calls. Text that may become a mark or a call is
    left out until the answer `is_final`; what is no call then is text.
    """
    reasoning, rest = split_reasoning(text, answer_format, is_final=is_final)
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
    mark = call_format.opening or ("<function=" if call_format.kind == "xml" else "{")
    parts: list[str] = []
    calls: list[ToolCall] = []
    position = searched = 0
    while (start := text.find(mark, searched)) >= 0:
        found = read_calls(text, start, answer_format)
        before = clean_between(text[position:start], calls)
        if not call_format.opening:
            before = before.rstrip().removesuffix("[")
        if found:
            parts.append(before)
            calls += found[0]
            position = searched = found[1]
        elif is_final or is_no_call(text, start, call_format):
            searched = start + len(mark)
        else:
            return "".join([*parts, before]).rstrip(), calls
    rest = text[position:]
    if not is_final:
        rest = hold_back(rest, (mark, call_format.closing)).rstrip()
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
        json.JSONDecoder().raw_decode(rest)
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
        found = read_xml_call(text, begin, answer_format.tools)
    elif call_format.kind == "named":
        found = read_named_call(text, begin)
    else:
        found = read_json_calls(text, begin)
    if found is None:
        return None
    calls, end = found
    names = {tool["function"]["name"] for tool in answer_format.tools}
    if not call_format.opening and not all(call["function"]["name"] in names for call in calls):
        return None  # without a mark, other JSON looks the same
    after = len(text) - len(text[end:].lstrip())
    if call_format.closing and text.startswith(call_format.closing, after):
        end = after + len(call_format.closing)
    return calls, end


def read_json_calls(text: str, begin: int) -> tuple[list[ToolCall], int] | None:
    """One call as a JSON object, or a list of them."""
    found = decode_json(text, begin)
    if found is None:
        return None
    value, end = found
    calls = [to_tool_call(item) for item in (value if isinstance(value, list) else [value])]
    complete = [call for call in calls if call is not None]
    return (complete, end) if complete and len(complete) == len(calls) else None


def read_named_call(text: str, begin: int) -> tuple[list[ToolCall], int] | None:
    """A name, a separator, and the arguments as JSON."""
    match = NAME_PATTERN.match(text, begin)
    if match is None:
        return None
    start = text.find("{", match.end(), match.end() + MAX_NAME_TO_ARGUMENTS)
    found = decode_json(text, start) if start >= 0 else None
    if found is None:
        return None
    call = to_tool_call({"name": match[1], "arguments": found[0]})
    return None if call is None else ([call], found[1])


def read_xml_call(
    text: str, begin: int, tools: Collection[dict[str, Any]]
) -> tuple[list[ToolCall], int] | None:
    """`<function=name>` with a `<parameter=key>` for each argument, whose types are in `tools`."""
    match = XML_FUNCTION_PATTERN.match(text, begin)
    if match is None:
        return None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    schema = schemas.get(match[1])
    properties = schema.get("properties") if isinstance(schema, dict) else None
    arguments = {
        key: parse_xml_value(value, properties.get(key) if isinstance(properties, dict) else None)
        for key, value in XML_PARAMETER_PATTERN.findall(match[2])
    }
    call = to_tool_call({"name": match[1], "arguments": arguments})
    return None if call is None else ([call], match.end())


def parse_xml_value(text: str, schema: Any) -> Any:
    """An argument that its schema calls a string is text; any other is JSON, if it is valid."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def decode_json(text: str, begin: int) -> tuple[Any, int] | None:
    """The JSON value at `begin` or after the whitespace there, and where it ends."""
    start = len(text) - len(text[begin:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def to_tool_call(value: Any) -> ToolCall | None:
    """A call in OpenAI's format from what a model wrote. None if it is no call."""
    function = value.get("function") if isinstance(value, dict) else None
    source = function if isinstance(function, dict) else value
    if not isinstance(source, dict):
        return None
    name = source.get("name", function)
    arguments = source.get("arguments", source.get("parameters", {}))
    if isinstance(arguments, str):
        found = decode_json(arguments, 0)
        arguments = found[0] if found else None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    call_id = value.get("id")
    return {
        "id": call_id if isinstance(call_id, str) and call_id else uuid4().hex[:ID_LENGTH],
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def hold_back(text: str, marks: Collection[str]) -> str:
    """The text without an end that may become one of the marks."""
    return text[: len(text) - longest_prefix_at_end(text, marks)]


def longest_prefix_at_end(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of `text` that is the start of a mark."""
    lengths = (size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size]))
    return max(lengths, default=0)
