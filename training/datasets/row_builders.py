"""Converts records into training rows under a column mapping. No files and no ORM here.

Every column is either used or named in `Row.unused`; the check counts these.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.datasets.column_mapping import HISTORY_KEY, ColumnMapping, Record
from training.datasets.errors import BadRow
from training.datasets.rendered_text import find_template, parse_rendered_text
from training.datasets.rows import (
    Message,
    Row,
    build_row,
    check_split,
    check_text,
    get_role,
    is_message,
    is_missing,
    join_text_parts,
    parse_turns,
    shorten_value,
)
from training.datasets.values import parse_nested


def to_row(record: Record, mapping: ColumnMapping) -> Row:
    """Convert a record into a training row.

    Raises:
        BadRow: names the field and what was expected.
    """
    split = check_split(record.get(mapping.split)) if mapping.split else ""
    row = ROW_BUILDERS[mapping.row_format](record, mapping.columns, split)
    used = {name for name in (*mapping.columns.values(), mapping.split) if name}
    used |= {HISTORY_KEY} if mapping.row_format == "chain" else set()
    return row.with_unused(
        *(name for name, value in record.items() if name not in used and not is_missing(value))
    )


def build_conversation_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """OpenAI messages or ShareGPT turns, with a system message from a column of its own."""
    column = columns.get("messages") or columns["conversations"]
    check_present(record, column)
    return build_with_system(record, columns, parse_turns(record[column]), split, field=column)


def build_with_system(
    record: Record,
    columns: dict[str, str],
    messages: Any,
    split: str,
    *,
    field: str = "messages",
) -> Row:
    """The row of the messages, with the tools and the system message from columns of their own. A
    system message among the messages comes first; then the column is not used.
    """
    system_column = columns.get("system", "")
    value = record.get(system_column) if system_column else None
    if isinstance(value, Mapping) and isinstance(value.get("parts"), list):  # Gemini's
        value = value["parts"]
    value = join_text_parts(value)
    system = "" if value is None else check_text(value, system_column)
    unused: list[str] = []
    if system.strip() and isinstance(messages, list):
        if messages and get_role(messages[0]) == "system":
            unused = [system_column]
        else:
            messages = [{"role": "system", "content": system}, *messages]
    row = build_row(messages, get_value(record, columns, "tools"), field=field, split=split)
    return row.with_unused(*unused)


def get_value(record: Record, columns: Mapping[str, str], part: str) -> Any:
    """The value of a part's column, or None if the part has no column."""
    return record.get(columns[part]) if part in columns else None


def build_alpaca_row(record: Record, columns: dict[str, str], split: str) -> Row:
    parts = [
        text
        for part in ("instruction", "input")
        if (text := get_optional_text(record, columns.get(part, ""))).strip()
    ]
    if not parts:
        raise BadRow(f"`{columns['instruction']}` is empty")
    output = get_required_text(record, columns["output"])
    return build_pair(record, columns, "\n\n".join(parts), output, split)


def build_pair_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """A prompt and its completion: texts, or lists of messages (TRL's conversational format), of
    which only the completion's are trained.
    """
    prompt, completion = (
        parse_messages(record, columns[part]) for part in ("prompt", "completion")
    )
    are_texts = all(isinstance(record.get(columns[p]), str) for p in ("prompt", "completion"))
    # An answer that happens to be JSON of messages is a text, unless the prompt is one, too.
    if prompt or (completion and not are_texts):
        question = prompt or [build_user_message(record, columns["prompt"])]
        answer = completion or [
            {"role": "assistant", "content": get_required_text(record, columns["completion"])}
        ]
        row = build_with_system(record, columns, [*mask_messages(question), *answer], split)
        return row.with_unused(*list_present(record, columns, ("context", "choices", "history")))
    text = get_required_text(record, columns["prompt"])
    context = get_optional_text(record, columns.get("context", ""))
    text = f"{context}\n\n{text}" if context.strip() else text
    answer_text = get_required_text(record, columns["completion"])
    choices = parse_choices(get_value(record, columns, "choices"), columns.get("choices", ""))
    if choices:
        text += "\n" + "".join(f"\n{label}. {choice}" for label, choice in choices)
        is_number = isinstance(record[columns["completion"]], int | float)
        answer_text = find_choice(choices, answer_text, columns["completion"], is_number=is_number)
    return build_pair(record, columns, text, answer_text, split)


def build_user_message(record: Record, column: str) -> Message:
    return {"role": "user", "content": get_required_text(record, column)}


def list_present(record: Record, columns: Mapping[str, str], parts: Sequence[str]) -> list[str]:
    """The columns of these parts that have a value."""
    return [
        columns[part]
        for part in parts
        if part in columns and not is_missing(record.get(columns[part]))
    ]


def find_choice(
    choices: list[tuple[str, str]], answer: str, column: str, *, is_number: bool
) -> str:
    """The answer to a multiple choice: a label or text as it is, and an index as its label. A text
    that may be both is an error, since the choices may be numbers.

    Raises:
        BadRow: an index that no choice has, or that is also the text of another choice.
    """
    labels, texts = [label for label, _ in choices], [text for _, text in choices]
    index_text = re.fullmatch(r"(\d{1,3})(?:\.0)?", answer.strip())
    if answer in labels or index_text is None:
        return answer
    index = int(index_text[1])
    if not is_number and answer in texts:
        if index >= len(choices) or texts[index] == answer:
            return answer
        raise BadRow(
            f"`{column}` is {answer}, which is the text of one choice and the index of another; "
            "write its label, such as A",
            group=f"`{column}` is the text of one choice and the index of another",
        )
    if index >= len(choices):
        raise BadRow(
            f"`{column}` is {answer}, but there are {len(choices)} choices (from 0)",
            group=f"`{column}` is no index of a choice",
        )
    return choices[index][0]


def parse_messages(record: Record, column: str) -> list[Message] | None:
    """The column's list of messages, or None if it holds something else. JSON in a text may be
    anything, so there it is a list of messages only if all roles are known.
    """
    raw = record.get(column) if column else None
    value = parse_turns(raw)
    if isinstance(value, Mapping) and is_message(value) and not isinstance(raw, str):
        value = [value]
    if isinstance(value, list) and value and all(is_message(item) for item in value):
        is_known = all(map(get_role, value)) or not isinstance(raw, str)
        return value if is_known else None
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
        texts, labels = value["text"], value.get("label")
        labels = labels if isinstance(labels, list) else list(string.ascii_uppercase[: len(texts)])
        if len(labels) != len(texts):
            raise BadRow(f"`{column}` has {len(texts)} texts and {len(labels)} labels")
        value = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
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
    return build_with_system(record, columns, messages, split)


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
    if isinstance(record.get(columns.get("prompt", "")), Mapping):
        return build_openai_preference_row(record, columns, split)
    chosen, rejected, prompt = (
        parse_dialog(record, columns.get(part, "")) for part in ("chosen", "rejected", "prompt")
    )
    if chosen is None:
        answer = {"role": "assistant", "content": get_required_text(record, columns["chosen"])}
        question = prompt or [build_preference_prompt(record, columns)]
        return build_with_system(record, columns, [*mask_messages(question), answer], split)
    shared = 0
    for first, second in zip(chosen, rejected or (), strict=False):
        if first != second:
            break
        shared += 1
    messages = [*mask_messages(chosen[:shared]), *chosen[shared:]]
    if prompt and chosen[: len(prompt)] != prompt:
        return build_with_system(record, columns, [*mask_messages(prompt), *messages], split)
    if not prompt and get_role(chosen[0]) == "assistant":
        question = [build_preference_prompt(record, columns)]
        return build_with_system(record, columns, [*mask_messages(question), *messages], split)
    row = build_with_system(record, columns, messages, split)
    text = record.get(columns.get("prompt", ""))
    is_repeated = prompt or any(text == message["content"] for message in row.messages)
    return row if is_repeated else row.with_unused(*list_present(record, columns, ("prompt",)))


def build_preference_prompt(record: Record, columns: Mapping[str, str]) -> Message:
    """The text of the prompt, with the input of LLaMA-Factory's Alpaca form."""
    text = get_required_text(record, columns.get("prompt", "prompt"))
    context = get_optional_text(record, columns.get("input", ""))
    return {"role": "user", "content": f"{text}\n\n{context}" if context.strip() else text}


def build_openai_preference_row(record: Record, columns: dict[str, str], split: str) -> Row:
    """OpenAI's form, whose `input` is an object with the messages and the tools."""
    column = columns["prompt"]
    inner = record[column]
    flat = {**record, column: inner.get("messages"), f"{column}.tools": inner.get("tools")}
    row = build_preference_row(flat, {**columns, "tools": f"{column}.tools"}, split)
    known = ("messages", "tools")
    return row.with_unused(
        *(
            f"{column}.{key}"
            for key, value in inner.items()
            if not (key in known or is_missing(value))
        )
    )


def parse_dialog(record: Record, column: str) -> list[Message] | None:
    """A list of messages, or a text such as HH-RLHF's, which begins with `Human:`."""
    messages, text = parse_messages(record, column), record.get(column)
    if messages is None and isinstance(text, str) and find_template(text) is not None:
        return parse_rendered_text(text, column)
    return messages


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
