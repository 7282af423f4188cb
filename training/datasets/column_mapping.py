"""Maps the columns of a file to the parts of a row: guesses the mapping from a sample, and converts
records into rows. No files and no ORM here.

Every column is either used or named in `Row.unused`; the check counts these.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.datasets.errors import BadRow, clean_text
from training.datasets.rendered_text import find_template, parse_rendered_text
from training.datasets.rows import (
    SPLIT_ALIASES,
    Message,
    Row,
    build_row,
    check_split,
    check_text,
    is_message,
    is_missing,
    shorten_value,
)
from training.datasets.values import parse_nested
from training.errors import UserError

Record = Mapping[str, Any]
MAX_COLUMN_NAME = 200
HISTORY_KEY = "__history__"  # where chains.py puts the earlier turns of a record
ROW_FORMATS = {
    "messages": "OpenAI messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca (instruction, input, output)",
    "pairs": "Prompt and completion",
    "preference": "Preference pairs: train on the chosen answers",
    "chain": "Rows linked by a parent id",
    "rendered": "Text with a chat template: train on the answers",
    "text": "Plain text: train on all of it",
}
# The parts of each row format: (part, required?)
ROW_FORMAT_PARTS: dict[str, tuple[tuple[str, bool], ...]] = {
    "messages": (("messages", True), ("system", False), ("tools", False)),
    "sharegpt": (("conversations", True), ("system", False), ("tools", False)),
    "alpaca": (
        ("instruction", True),
        ("input", False),
        ("output", True),
        ("history", False),
        ("system", False),
    ),
    "pairs": (
        ("prompt", True),
        ("completion", True),
        ("context", False),
        ("choices", False),
        ("history", False),
        ("system", False),
        ("tools", False),
    ),
    "preference": (("prompt", False), ("chosen", True), ("rejected", False), ("system", False)),
    "chain": (
        ("id", True),
        ("parent", True),
        ("prompt", True),
        ("completion", True),
        ("system", False),
    ),
    "rendered": (("text", True),),
    "text": (("text", True),),
}
# Other names of the columns that hold a part
PART_ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": (
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
    ),
    "completion": (
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
    ),
    "output": ("output", "response", "completion", "answer"),
    "input": ("input", "context"),
    "context": ("context", "passage"),
    "choices": ("choices", "options"),
    "history": ("history",),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "id": ("id", "row_id", "message_id"),
    "parent": ("parent_id", "parent"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
# The question under a column that is not used, by the part that it may fill
PART_QUESTIONS = {
    "system": "Use it as the system message?",
    "tools": "Use it as the tools?",
    "history": "Use it as earlier turns?",
    "context": "Add it to the prompt?",
    "input": "Add it to the prompt?",
    "choices": "Add it to the prompt?",
}
IDENTIFIER_WORDS = 3  # a column of shorter texts is a name, an id, a category or an address
PREFERENCE_NOTE = (
    "This is preference data. Training uses the chosen answers; the rejected ones are only "
    "compared with them, to find where the answers begin."
)
FEEDBACK_NOTE = (
    "`label` says which answers are good. Rows whose label is false would be trained like the "
    "others; remove them from the file first."
)
RENDERED_NOTE = (
    "The text was rendered with a chat template ({template}). It is read as conversations, so only "
    "the answers are trained. Choose plain text to train on all of it."
)
UNUSED_NOTE = "Some columns are not used: {names}. Check whether the answer depends on them."


@dataclass(frozen=True)
class ColumnMapping:
    """The row format and the column of each of its parts. `split` is the column that names a row's
    split. `note` says why the mapping has to be confirmed, if it is a guess.
    """

    row_format: str
    columns: dict[str, str] = field(default_factory=dict)
    split: str = ""
    is_certain: bool = True
    note: str = ""

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
            if not is_valid_column_name(name):
                raise UserError(
                    f"The column name {clean_text(name)[:40]!r} is not supported. Rename it.",
                    field="row_format",
                )
        for part, needed in ROW_FORMAT_PARTS[row_format]:
            if needed and part not in columns:
                raise UserError(f"Choose the column that holds the {part}.", field=part)
        return cls(
            row_format,
            columns,
            str(values.get("split", "")),
            bool(values.get("is_certain", True)),
            str(values.get("note", "")),
        )


def is_valid_column_name(name: str) -> bool:
    """True if a column of this name can be stored and chosen."""
    return len(name) <= MAX_COLUMN_NAME and clean_text(name) == name


def guess_mapping(sample: Sequence[Record]) -> ColumnMapping:
    """The most likely mapping, judged by the column names and their values. It is certain if the
    columns that it leaves out hold no text of several words.
    """
    names = [
        name
        for name in dict.fromkeys(name for record in sample for name in record)
        if is_valid_column_name(name)
    ]
    split = next(
        (n for n in names if n.lower() == "split" and any(is_split(r.get(n)) for r in sample)), ""
    )
    lower = {name.lower(): name for name in reversed(names) if name != split}
    mapping = (
        guess_preference(sample, lower)
        or guess_conversation(sample, names, lower)
        or guess_chain(lower)
        or guess_alpaca(lower)
        or guess_pair_or_text(sample, [name for name in names if name != split], lower)
    )
    note = mapping.note
    if mapping.is_complete and not note:
        skipped = [
            name
            for name in names
            if name not in (*mapping.columns.values(), split) and has_text(sample, name)
        ]
        if skipped:
            listed = ", ".join(f"`{name[:40]}`" for name in skipped[:5])
            note = UNUSED_NOTE.format(names=listed)
    return ColumnMapping(
        mapping.row_format, mapping.columns, split, mapping.is_certain and not note, note
    )


def find_part(part: str, lower: Mapping[str, str], used: Sequence[str] = ()) -> dict[str, str]:
    """`{part: column}`, or nothing if no column has one of the part's names."""
    column = next(
        (lower[name] for name in PART_ALIASES[part] if name in lower and lower[name] not in used),
        "",
    )
    return {part: column} if column else {}


def guess_preference(sample: Sequence[Record], lower: Mapping[str, str]) -> ColumnMapping | None:
    if not {"chosen", "rejected"} <= lower.keys():
        return None
    columns = {"chosen": lower["chosen"], "rejected": lower["rejected"]}
    columns |= find_part("prompt", lower) | find_part("system", lower)
    return ColumnMapping("preference", columns, note=PREFERENCE_NOTE)


def guess_conversation(
    sample: Sequence[Record], names: Sequence[str], lower: Mapping[str, str]
) -> ColumnMapping | None:
    """The first column that holds lists of messages; two of them are a prompt and a completion."""
    found = {name: kind for name in names if (kind := find_message_kind(sample, name))}
    pair = find_part("prompt", lower) | find_part("completion", lower)
    if len(pair) == 2 and found and set(found) <= set(pair.values()):
        return ColumnMapping("pairs", pair | find_part("system", lower) | find_part("tools", lower))
    if not found:
        if "messages" not in lower:
            return None
        found = {lower["messages"]: "messages"}
    column = next(iter(found))
    row_format = "sharegpt" if found[column] == "sharegpt" else "messages"
    columns = {ROW_FORMAT_PARTS[row_format][0][0]: column}
    used = list(columns.values())
    columns |= find_part("system", lower, used) | find_part("tools", lower, used)
    note = ""
    if len(found) > 1:
        others = ", ".join(f"`{name[:40]}`" for name in list(found)[1:])
        note = f"Several columns hold messages. `{column[:40]}` is used, and {others} not."
    return ColumnMapping(row_format, columns, note=note)


def find_message_kind(sample: Sequence[Record], name: str) -> str:
    """`messages` or `sharegpt` if the column holds lists of messages, else an empty text."""
    for record in sample:
        turns = parse_turns(record.get(name))
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            if "from" in turns[0] and any(key in turns[0] for key in ("value", "content")):
                return "sharegpt"
            if is_message(turns[0]) or name == "messages":
                return "messages"
    return ""


def guess_chain(lower: Mapping[str, str]) -> ColumnMapping | None:
    parent = find_part("parent", lower)
    columns = parent | find_part("id", lower)
    columns |= find_part("prompt", lower) | find_part("completion", lower)
    columns |= find_part("system", lower)
    mapping = ColumnMapping("chain", columns)
    return mapping if parent and mapping.is_complete else None


def guess_alpaca(lower: Mapping[str, str]) -> ColumnMapping | None:
    """Alpaca, or Dolly: `instruction`, `context` and `response`."""
    output = find_part("output", lower)
    if "instruction" not in lower or not output:
        return None
    columns = {"instruction": lower["instruction"]} | output | find_part("input", lower)
    return ColumnMapping(
        "alpaca", columns | find_part("history", lower) | find_part("system", lower)
    )


def guess_pair_or_text(
    sample: Sequence[Record], names: Sequence[str], lower: Mapping[str, str]
) -> ColumnMapping:
    completion = find_part("completion", lower)
    prompt = find_part("prompt", lower, list(completion.values()))
    system = find_part("system", lower)
    if prompt and completion:
        columns = prompt | completion | find_part("context", lower) | find_part("choices", lower)
        label = lower.get("label", "")
        has_feedback = label not in columns.values() and any(
            isinstance(record.get(label), bool) for record in sample
        )
        note = FEEDBACK_NOTE if has_feedback else ""
        return ColumnMapping("pairs", columns | system | find_part("tools", lower), note=note)
    text_columns = [name for name in names if any(isinstance(r.get(name), str) for r in sample)]
    if len(text_columns) == 1 or (not completion and "text" in lower and text_columns):
        return guess_text(sample, lower.get("text") or text_columns[0])
    if len(text_columns) > 1:
        question = next(iter(prompt.values()), "") or next(
            name for name in text_columns if name not in completion.values()
        )
        answer = next(iter(completion.values()), "") or next(
            name for name in text_columns if name != question
        )
        return ColumnMapping(
            "pairs", {"prompt": question, "completion": answer} | system, is_certain=False
        )
    return ColumnMapping("pairs", {}, is_certain=False)


def guess_text(sample: Sequence[Record], column: str) -> ColumnMapping:
    """Plain text, or text that was rendered with a well-known chat template."""
    texts = [record[column] for record in sample if isinstance(record.get(column), str)]
    templates = [find_template(text) for text in texts]
    template = next((template for template in templates if template), None)
    if template is None:
        return ColumnMapping("text", {"text": column})
    note = RENDERED_NOTE.format(template=template.name)
    row_format = "rendered" if all(templates) else "text"
    return ColumnMapping(row_format, {"text": column}, note=note)


def is_split(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in SPLIT_ALIASES


def has_text(sample: Sequence[Record], name: str) -> bool:
    """Whether a column holds text of several words, lists or objects: more than an id or a
    category.
    """
    values = [value for record in sample if not is_missing(value := record.get(name))]
    if any(isinstance(value, list | dict) for value in values):
        return True
    words = [len(value.split()) for value in values if isinstance(value, str)]
    return bool(words) and sum(words) >= IDENTIFIER_WORDS * len(words)


def suggest_part(mapping: ColumnMapping, column: str) -> str:
    """The part of the row format that an unused column may fill, or an empty text."""
    return next(
        (
            part
            for part, _ in ROW_FORMAT_PARTS[mapping.row_format]
            if part in PART_QUESTIONS
            and part not in mapping.columns
            and column.lower() in PART_ALIASES[part]
        ),
        "",
    )


def parse_turns(value: Any) -> Any:
    """A list of messages. Older versions of `datasets` store it as an object of lists."""
    value = parse_nested(value)
    if isinstance(value, Mapping):
        columns = {key: inner for key, inner in value.items() if isinstance(inner, list)}
        lengths = {len(inner) for inner in columns.values()}
        if ({"role", "from"} & columns.keys()) and len(lengths) == 1:
            return [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
    return value


def to_row(record: Record, mapping: ColumnMapping) -> Row:
    """Convert a record into a training row.

    Raises:
        BadRow: names the field and what was expected.
    """
    split = check_split(record.get(mapping.split)) if mapping.split else ""
    row = ROW_BUILDERS[mapping.row_format](record, mapping.columns, split)
    used = {*mapping.columns.values(), mapping.split, HISTORY_KEY}
    return row.with_unused(
        *(name for name, value in record.items() if name not in used and not is_missing(value))
    )


def build_conversation_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """OpenAI messages or ShareGPT turns, with a system message from a column of its own."""
    column = columns.get("messages") or columns["conversations"]
    check_present(record, column)
    messages = parse_turns(record[column])
    system_column = columns.get("system", "")
    system = get_optional_text(record, system_column)
    unused: list[str] = []
    if system.strip() and isinstance(messages, list):
        if messages and is_system(messages[0]):
            unused = [system_column]
        else:
            messages = [{"role": "system", "content": system}, *messages]
    tools = record.get(columns.get("tools", ""))
    return build_row(messages, tools, field=column, split=split).with_unused(*unused)


def is_system(message: Any) -> bool:
    return isinstance(message, Mapping) and "system" in (message.get("role"), message.get("from"))


def build_alpaca_row(record: Record, columns: dict[str, str], split: str) -> Row:
    prompt = get_required_text(record, columns["instruction"])
    context = get_optional_text(record, columns.get("input", ""))
    return build_pair(
        record,
        columns,
        f"{prompt}\n\n{context}" if context.strip() else prompt,
        get_required_text(record, columns["output"]),
        split,
    )


def build_pair_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """A prompt and its completion: texts, or lists of messages (TRL's conversational format), of
    which only the completion's are trained.
    """
    prompt_column, completion_column = columns["prompt"], columns["completion"]
    prompt, completion = (
        parse_messages(record, prompt_column),
        parse_messages(record, completion_column),
    )
    if prompt is not None or completion is not None:
        question = prompt or [{"role": "user", "content": get_required_text(record, prompt_column)}]
        answer = completion or [
            {"role": "assistant", "content": get_required_text(record, completion_column)}
        ]
        return add_system(record, columns, [*mask_messages(question), *answer], split)
    text = get_required_text(record, prompt_column)
    context = get_optional_text(record, columns.get("context", ""))
    text = f"{context}\n\n{text}" if context.strip() else text
    choices = parse_choices(record.get(columns.get("choices", "")), columns.get("choices", ""))
    answer_text = get_required_text(record, completion_column)
    if choices:
        text += "\n" + "".join(f"\n{label}. {choice}" for label, choice in choices)
        index = record.get(completion_column)
        if isinstance(index, int) and 0 <= index < len(choices):
            answer_text = choices[index][0]
    return build_pair(record, columns, text, answer_text, split)


def parse_messages(record: Record, column: str) -> list[Message] | None:
    """The column's list of messages, or None if it holds something else."""
    value = parse_turns(record.get(column)) if column else None
    if isinstance(value, Mapping) and is_message(value):
        value = [value]
    if isinstance(value, list) and value and all(is_message(item) for item in value):
        return value
    return None


def mask_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as context that is not trained."""
    return [{**message, "weight": 0} for message in messages]


def parse_choices(value: Any, column: str) -> list[tuple[str, str]]:
    """Labels and texts of a multiple choice: a list of texts, a list of `{"label", "text"}`, or
    `{"label": [...], "text": [...]}`.
    """
    value = parse_nested(value)
    if is_missing(value):
        return []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels = value.get("label")
        labels = labels if isinstance(labels, list) else string.ascii_uppercase
        value = [
            {"label": label, "text": text}
            for label, text in zip(labels, value["text"], strict=False)
        ]
    if isinstance(value, Mapping):
        value = [{"label": label, "text": text} for label, text in value.items()]
    if not isinstance(value, list) or len(value) > len(string.ascii_uppercase):
        raise BadRow(f"`{column}` is {shorten_value(value)}; expected a list of texts")
    choices = []
    for letter, choice in zip(string.ascii_uppercase, value, strict=False):
        item = choice if isinstance(choice, Mapping) else {"text": choice}
        label = item.get("label")
        text = check_text(item.get("text"), column)
        choices.append((check_text(letter if label is None else label, column), text))
    return choices


def build_pair(
    record: Record, columns: dict[str, str], prompt: str, completion: str, split: str
) -> Row:
    messages = [
        *parse_history(record, columns.get("history", "")),
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    return add_system(record, columns, messages, split)


def add_system(record: Record, columns: dict[str, str], messages: list[Message], split: str) -> Row:
    system = get_optional_text(record, columns.get("system", ""))
    if system.strip() and not is_system(messages[0]):
        messages = [{"role": "system", "content": system}, *messages]
    return build_row(messages, record.get(columns.get("tools", "")), split=split)


def parse_history(record: Record, column: str) -> list[Message]:
    """Earlier turns: pairs of a prompt and an answer (LLaMA-Factory's `history`), or messages."""
    value = parse_turns(record.get(column)) if column else None
    if is_missing(value):
        return []
    if not isinstance(value, list):
        raise BadRow(f"`{column}` is {shorten_value(value)}; expected a list of earlier turns")
    if all(is_message(turn) for turn in value):
        return list(value)
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow(
                f"`{column}` has the turn {shorten_value(turn)}; expected a prompt and an answer",
                group=f"`{column}` has a turn that is not a prompt and an answer",
            )
        messages += [
            {"role": "user", "content": check_text(turn[0], column)},
            {"role": "assistant", "content": check_text(turn[1], column)},
        ]
    return messages


def build_preference_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """The prompt and the chosen answer. Messages that chosen and rejected share are the prompt and
    are not trained.
    """
    chosen, rejected = (
        parse_messages(record, columns.get(part, "")) for part in ("chosen", "rejected")
    )
    prompt_column = columns.get("prompt", "")
    prompt = parse_messages(record, prompt_column)
    if chosen is None:
        answer = get_required_text(record, columns["chosen"])
        question = prompt or [
            {"role": "user", "content": get_required_text(record, prompt_column or "prompt")}
        ]
        messages = [*mask_messages(question), {"role": "assistant", "content": answer}]
        return add_system(record, columns, messages, split)
    shared = 0
    for first, second in zip(chosen, rejected or (), strict=False):
        if first != second:
            break
        shared += 1
    messages = [*mask_messages(chosen[:shared]), *chosen[shared:]]
    if not any(turn.get("role", turn.get("from")) in ("user", "human") for turn in chosen):
        question = prompt or [
            {"role": "user", "content": get_required_text(record, prompt_column or "prompt")}
        ]
        messages = [*mask_messages(question), *messages]
    return add_system(record, columns, messages, split)


def build_rendered_row(record: Record, columns: dict[str, str], split: str) -> Row:
    text = get_required_text(record, columns["text"])
    return build_row(parse_rendered_text(text, columns["text"]), field=columns["text"], split=split)


def build_text_row(record: Record, columns: dict[str, str], split: str) -> Row:
    return Row(text=get_required_text(record, columns["text"]), split=split)


def build_chain_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """`chains.link_rows` has put the earlier turns into the record."""
    return build_pair(
        record,
        {**columns, "history": HISTORY_KEY},
        get_required_text(record, columns["prompt"]),
        get_required_text(record, columns["completion"]),
        split,
    )


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
    "messages": build_conversation_row,
    "sharegpt": build_conversation_row,
    "alpaca": build_alpaca_row,
    "pairs": build_pair_row,
    "preference": build_preference_row,
    "chain": build_chain_row,
    "rendered": build_rendered_row,
    "text": build_text_row,
}
