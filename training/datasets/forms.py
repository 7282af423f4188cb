"""Which column means what: the form of the data, guessed from a sample, and a record made a row. It
knows no files and no ORM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.datasets.rows import (
    SPLIT_NAMES,
    BadRow,
    Row,
    check_messages,
    check_split,
    check_text,
    check_tools,
    clean,
    parsed,
    short,
)
from training.errors import UserError

Record = Mapping[str, Any]
MOST_NAME = 200
FORMS = {
    "messages": "OpenAI messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca (instruction, input, output)",
    "pairs": "Prompt and completion",
    "text": "Plain text",
}
# What each form asks for: (column's part, needed?).
PARTS: dict[str, tuple[tuple[str, bool], ...]] = {
    "messages": (("messages", True), ("tools", False)),
    "sharegpt": (("conversations", True), ("system", False), ("tools", False)),
    "alpaca": (("instruction", True), ("input", False), ("output", True), ("system", False)),
    "pairs": (("prompt", True), ("completion", True), ("system", False)),
    "text": (("text", True),),
}
PROMPTS = (
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
COMPLETIONS = (
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
class Mapped:
    """The form of the data and the column of each of its parts; `split` is the column that names
    the part of a row.
    """

    form: str
    columns: dict[str, str] = field(default_factory=dict)
    split: str = ""
    sure: bool = True

    @property
    def complete(self) -> bool:
        """Has every needed part a column?"""
        return all(part in self.columns for part, needed in PARTS[self.form] if needed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mapped:
        """Raises UserError: an unknown form, or a needed part without a column."""
        form = str(values.get("form", ""))
        if form not in FORMS:
            raise UserError(f"The form is {form!r}; there are {', '.join(FORMS)}.", field="form")
        given = values.get("columns", {})
        columns = {part: str(given[part]) for part, _ in PARTS[form] if given.get(part)}
        for name in (*columns.values(), str(values.get("split", ""))):
            if clean(name) != name or len(name) > MOST_NAME:
                raise UserError(
                    f"The column {clean(name)[:40]!r} has a name that cannot be stored; rename it.",
                    field="form",
                )
        for part, needed in PARTS[form]:
            if needed and part not in columns:
                raise UserError(f"Choose the column that holds the {part}.", field=part)
        return cls(form, columns, str(values.get("split", "")), bool(values.get("sure", True)))


def fit(name: str) -> bool:
    """A column's name that can be stored and chosen."""
    return len(name) <= MOST_NAME and clean(name) == name


def guess(sample: Sequence[Record]) -> Mapped:
    """The most likely meaning of the columns, judged by names and by what stands in them."""
    names = [
        name for name in dict.fromkeys(name for record in sample for name in record) if fit(name)
    ]
    split = next(
        (n for n in names if n.lower() == "split" and any(is_split(r.get(n)) for r in sample)), ""
    )
    found = conversations(sample, names)
    if found:
        form, column = found
        extra: dict[str, str] = {
            name: name
            for name in ("system", "tools")
            if name in names and name in dict(PARTS[form])
        }
        return Mapped(form, {PARTS[form][0][0]: column, **extra}, split)
    lower = {name.lower(): name for name in names}
    if {"instruction", "output"} <= lower.keys():
        optional: dict[str, str] = {
            part: lower[part] for part in ("input", "system") if part in lower
        }
        return Mapped(
            "alpaca",
            {"instruction": lower["instruction"], "output": lower["output"], **optional},
            split,
        )
    return guess_pairs(names, lower, split, sample)


def guess_pairs(
    names: list[str], lower: dict[str, str], split: str, sample: Sequence[Record]
) -> Mapped:
    completion = next((lower[name] for name in COMPLETIONS if name in lower), "")
    prompt = next(
        (lower[name] for name in PROMPTS if name in lower and lower[name] != completion), ""
    )
    system = {"system": lower["system"]} if "system" in lower else {}
    if prompt and completion:
        return Mapped("pairs", {"prompt": prompt, "completion": completion, **system}, split)
    texts = [
        name
        for name in names
        if name != split and any(isinstance(r.get(name), str) for r in sample)
    ]
    if len(texts) == 1 or (not completion and "text" in lower):
        return Mapped("text", {"text": lower.get("text") or texts[0]}, split)
    if len(texts) > 1:
        prompt = prompt or next(name for name in texts if name != completion)
        completion = completion or next(name for name in texts if name != prompt)
        return Mapped(
            "pairs", {"prompt": prompt, "completion": completion, **system}, split, sure=False
        )
    return Mapped("pairs", {}, split, sure=False)


def conversations(sample: Sequence[Record], names: Sequence[str]) -> tuple[str, str] | None:
    """The first column that holds lists of messages, and whether they speak OpenAI's or ShareGPT's
    way.
    """
    for name in names:
        for record in sample:
            value = as_list(record.get(name))
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                if "from" in value[0] and "value" in value[0]:
                    return "sharegpt", name
                if "role" in value[0] or name == "messages":
                    return "messages", name
    return next((("messages", name) for name in names if name == "messages"), None)


def is_split(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in SPLIT_NAMES


def as_list(value: Any) -> Any:
    """A list that a CSV cell holds as JSON text, or the value as it is."""
    return parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def to_row(record: Record, mapped: Mapped) -> Row:
    """One record as a row to train on.

    Raises:
        BadRow: names the field and what was expected.
    """
    split = check_split(record.get(mapped.split)) if mapped.split else ""
    return MAKERS[mapped.form](record, mapped.columns, split)


def from_messages(record: Record, columns: dict[str, str], split: str) -> Row:
    present(record, columns["messages"])
    messages = check_messages(as_list(record[columns["messages"]]), columns["messages"])
    return Row(
        messages=messages, tools=check_tools(record.get(columns.get("tools", ""))), split=split
    )


def from_sharegpt(record: Record, columns: dict[str, str], split: str) -> Row:
    column = columns["conversations"]
    present(record, column)
    turns = as_list(record[column])
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"`{column}` must be a list with at least one turn")
    messages = [turn_message(turn, place) for place, turn in enumerate(turns, start=1)]
    system = record.get(columns.get("system", ""))
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = check_tools(record.get(columns.get("tools", "")))
    return Row(messages=check_messages(messages, column), tools=tools, split=split)


def turn_message(turn: Any, place: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(
            f"turn {place} must be an object with `from` and `value`",
            group="a turn is not an object",
        )
    said = turn.get("from")
    if said == "function_call":
        call = (
            parsed(turn.get("value", ""))
            if isinstance(turn.get("value"), str)
            else turn.get("value")
        )
        return {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    role = SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(
            f"turn {place}: `from` is {short(said)}; expected human, gpt, system, function_call "
            "or observation",
            group="`from` is not one of human, gpt, system, function_call or observation",
        )
    return {"role": role, "content": check_text(turn.get("value"), "value", f"turn {place}: ")}


def from_alpaca(record: Record, columns: dict[str, str], split: str) -> Row:
    asked = needed_text(record, columns["instruction"])
    more = optional_text(record, columns.get("input", ""))
    return conversation(
        record, columns, f"{asked}\n\n{more}" if more.strip() else asked, "output", split
    )


def from_pairs(record: Record, columns: dict[str, str], split: str) -> Row:
    return conversation(
        record, columns, needed_text(record, columns["prompt"]), "completion", split
    )


def conversation(
    record: Record, columns: dict[str, str], asked: str, answer: str, split: str
) -> Row:
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": needed_text(record, columns[answer])},
    ]
    system = optional_text(record, columns.get("system", ""))
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return Row(messages=tuple(messages), split=split)


def from_text(record: Record, columns: dict[str, str], split: str) -> Row:
    return Row(text=needed_text(record, columns["text"]), split=split)


def needed_text(record: Record, column: str) -> str:
    present(record, column)
    text = check_text(record[column], column)
    if not text.strip():
        raise BadRow(f"`{column}` is empty")
    return text


def optional_text(record: Record, column: str) -> str:
    value = record.get(column) if column else None
    return "" if value is None else check_text(value, column)


def present(record: Record, column: str) -> None:
    if record.get(column) is None:
        found = ", ".join(f"`{str(name)[:40]}`" for name in list(record)[:5]) or "no fields"
        raise BadRow(f"`{column}` is missing; found {found}", group=f"`{column}` is missing")


MAKERS: dict[str, Callable[[Record, dict[str, str], str], Row]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "pairs": from_pairs,
    "text": from_text,
}
