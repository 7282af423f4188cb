"""Maps the columns of a file to the parts of a row: guesses the mapping from a sample, and converts
records into rows. No files and no ORM here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.datasets.rows import (
    SPLIT_ALIASES,
    BadRow,
    Row,
    check_messages,
    check_split,
    check_text,
    check_tools,
    clean_text,
    parse_json_or_none,
    shorten_value,
)
from training.errors import UserError

Record = Mapping[str, Any]
MAX_COLUMN_NAME = 200
ROW_FORMATS = {
    "messages": "OpenAI messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca (instruction, input, output)",
    "pairs": "Prompt and completion",
    "text": "Plain text",
}
# The parts of each row format: (part, required?)
ROW_FORMAT_PARTS: dict[str, tuple[tuple[str, bool], ...]] = {
    "messages": (("messages", True), ("tools", False)),
    "sharegpt": (("conversations", True), ("system", False), ("tools", False)),
    "alpaca": (("instruction", True), ("input", False), ("output", True), ("system", False)),
    "pairs": (("prompt", True), ("completion", True), ("system", False)),
    "text": (("text", True),),
}
PROMPT_COLUMNS = (
    "prompt",
    "question",
    "query",
    "instruction",
    "input",
    "user",
    "human",
    "source",
    "description",
    "text",
    "sentence",
)
COMPLETION_COLUMNS = (
    "completion",
    "answer",
    "response",
    "output",
    "target",
    "assistant",
    "label",
    "summary",
    "chosen",
    "command",
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class ColumnMapping:
    """The row format and the column of each of its parts. `split` is the column that names a row's
    split.
    """

    row_format: str
    columns: dict[str, str] = field(default_factory=dict)
    split: str = ""
    is_certain: bool = True

    @property
    def is_complete(self) -> bool:
        """True if every required part has a column."""
        return all(
            part in self.columns for part, needed in ROW_FORMAT_PARTS[self.row_format] if needed
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ColumnMapping:
        """Build a mapping from JSON.

        Raises:
            UserError: unknown row format, or a required part without a column.
        """
        row_format = str(values.get("row_format", ""))
        if row_format not in ROW_FORMATS:
            raise UserError(
                f"Unknown row format {row_format!r}. Available: {', '.join(ROW_FORMATS)}.",
                field="row_format",
            )
        chosen_columns = values.get("columns", {})
        columns = {
            part: str(chosen_columns[part])
            for part, _ in ROW_FORMAT_PARTS[row_format]
            if chosen_columns.get(part)
        }
        for name in (*columns.values(), str(values.get("split", ""))):
            if clean_text(name) != name or len(name) > MAX_COLUMN_NAME:
                raise UserError(
                    f"The column name {clean_text(name)[:40]!r} is not supported. Rename it.",
                    field="row_format",
                )
        for part, needed in ROW_FORMAT_PARTS[row_format]:
            if needed and part not in columns:
                raise UserError(f"Choose the column that holds the {part}.", field=part)
        return cls(
            row_format, columns, str(values.get("split", "")), bool(values.get("is_certain", True))
        )


def is_valid_column_name(name: str) -> bool:
    """True if a column of this name can be stored and chosen."""
    return len(name) <= MAX_COLUMN_NAME and clean_text(name) == name


def guess_mapping(sample: Sequence[Record]) -> ColumnMapping:
    """The most likely mapping, judged by the column names and their values."""
    names = [
        name
        for name in dict.fromkeys(name for record in sample for name in record)
        if is_valid_column_name(name)
    ]
    split = next(
        (n for n in names if n.lower() == "split" and any(is_split(r.get(n)) for r in sample)), ""
    )
    conversation_column = find_conversations(sample, names)
    if conversation_column:
        row_format, column = conversation_column
        extra: dict[str, str] = {
            name: name
            for name in ("system", "tools")
            if name in names and name in dict(ROW_FORMAT_PARTS[row_format])
        }
        return ColumnMapping(
            row_format, {ROW_FORMAT_PARTS[row_format][0][0]: column, **extra}, split
        )
    lower = {name.lower(): name for name in names}
    if {"instruction", "output"} <= lower.keys():
        optional: dict[str, str] = {
            part: lower[part] for part in ("input", "system") if part in lower
        }
        return ColumnMapping(
            "alpaca",
            {"instruction": lower["instruction"], "output": lower["output"], **optional},
            split,
        )
    return guess_text_columns(names, lower, split, sample)


def guess_text_columns(
    names: list[str], lower: dict[str, str], split: str, sample: Sequence[Record]
) -> ColumnMapping:
    completion = next((lower[name] for name in COMPLETION_COLUMNS if name in lower), "")
    prompt = next(
        (lower[name] for name in PROMPT_COLUMNS if name in lower and lower[name] != completion), ""
    )
    system = {"system": lower["system"]} if "system" in lower else {}
    if prompt and completion:
        return ColumnMapping("pairs", {"prompt": prompt, "completion": completion, **system}, split)
    text_columns = [
        name
        for name in names
        if name != split and any(isinstance(r.get(name), str) for r in sample)
    ]
    if len(text_columns) == 1 or (not completion and "text" in lower):
        return ColumnMapping("text", {"text": lower.get("text") or text_columns[0]}, split)
    if len(text_columns) > 1:
        prompt = prompt or next(name for name in text_columns if name != completion)
        completion = completion or next(name for name in text_columns if name != prompt)
        return ColumnMapping(
            "pairs", {"prompt": prompt, "completion": completion, **system}, split, is_certain=False
        )
    return ColumnMapping("pairs", {}, split, is_certain=False)


def find_conversations(sample: Sequence[Record], names: Sequence[str]) -> tuple[str, str] | None:
    """The first column that holds lists of messages, with its format: OpenAI (`messages`) or
    ShareGPT.
    """
    for name in names:
        for record in sample:
            value = parse_list(record.get(name))
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                if "from" in value[0] and "value" in value[0]:
                    return "sharegpt", name
                if "role" in value[0] or name == "messages":
                    return "messages", name
    return next((("messages", name) for name in names if name == "messages"), None)


def is_split(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in SPLIT_ALIASES


def parse_list(value: Any) -> Any:
    """A list that a CSV cell holds as JSON text; any other value unchanged."""
    return (
        parse_json_or_none(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    )


def to_row(record: Record, mapping: ColumnMapping) -> Row:
    """Convert a record into a training row.

    Raises:
        BadRow: names the field and what was expected.
    """
    split = check_split(record.get(mapping.split)) if mapping.split else ""
    return ROW_BUILDERS[mapping.row_format](record, mapping.columns, split)


def from_messages(record: Record, columns: dict[str, str], split: str) -> Row:
    check_present(record, columns["messages"])
    messages = check_messages(parse_list(record[columns["messages"]]), columns["messages"])
    return Row(
        messages=messages, tools=check_tools(record.get(columns.get("tools", ""))), split=split
    )


def from_sharegpt(record: Record, columns: dict[str, str], split: str) -> Row:
    column = columns["conversations"]
    check_present(record, column)
    turns = parse_list(record[column])
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"`{column}` must be a list with at least one turn")
    messages = [turn_message(turn, position) for position, turn in enumerate(turns, start=1)]
    system = record.get(columns.get("system", ""))
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = check_tools(record.get(columns.get("tools", "")))
    return Row(messages=check_messages(messages, column), tools=tools, split=split)


def turn_message(turn: Any, position: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(
            f"turn {position} must be an object with `from` and `value`",
            group="a turn is not an object",
        )
    sender = turn.get("from")
    if sender == "function_call":
        call = (
            parse_json_or_none(turn.get("value", ""))
            if isinstance(turn.get("value"), str)
            else turn.get("value")
        )
        return {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise BadRow(
            f"turn {position}: `from` is {shorten_value(sender)}; expected human, gpt, system, "
            "function_call or observation",
            group="`from` is not one of human, gpt, system, function_call or observation",
        )
    return {"role": role, "content": check_text(turn.get("value"), "value", f"turn {position}: ")}


def from_alpaca(record: Record, columns: dict[str, str], split: str) -> Row:
    prompt = get_required_text(record, columns["instruction"])
    context = get_optional_text(record, columns.get("input", ""))
    return build_conversation(
        record, columns, f"{prompt}\n\n{context}" if context.strip() else prompt, "output", split
    )


def from_pairs(record: Record, columns: dict[str, str], split: str) -> Row:
    return build_conversation(
        record, columns, get_required_text(record, columns["prompt"]), "completion", split
    )


def build_conversation(
    record: Record, columns: dict[str, str], prompt: str, completion_part: str, split: str
) -> Row:
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": get_required_text(record, columns[completion_part])},
    ]
    system = get_optional_text(record, columns.get("system", ""))
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return Row(messages=tuple(messages), split=split)


def from_text(record: Record, columns: dict[str, str], split: str) -> Row:
    return Row(text=get_required_text(record, columns["text"]), split=split)


def get_required_text(record: Record, column: str) -> str:
    check_present(record, column)
    text = check_text(record[column], column)
    if not text.strip():
        raise BadRow(f"`{column}` is empty")
    return text


def get_optional_text(record: Record, column: str) -> str:
    value = record.get(column) if column else None
    return "" if value is None else check_text(value, column)


def check_present(record: Record, column: str) -> None:
    if record.get(column) is None:
        field_names = ", ".join(f"`{str(name)[:40]}`" for name in list(record)[:5]) or "no fields"
        raise BadRow(f"`{column}` is missing; found {field_names}", group=f"`{column}` is missing")


ROW_BUILDERS: dict[str, Callable[[Record, dict[str, str], str], Row]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "pairs": from_pairs,
    "text": from_text,
}
