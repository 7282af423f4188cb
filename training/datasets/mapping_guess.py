"""Guesses the column mapping of a file from a sample of its records, by the names of the columns
and by their values. A guess that may be wrong is not certain, and its note says why.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from training.datasets.column_mapping import (
    PART_ALIASES,
    PART_QUESTIONS,
    ROW_FORMAT_PARTS,
    ColumnMapping,
    Record,
    is_valid_column_name,
)
from training.datasets.errors import BadRow, clean_text
from training.datasets.rendered_text import SPECIAL_TOKENS, find_headings, find_template
from training.datasets.rows import (
    CONTENT_KEYS,
    ROLE_KEYS,
    SPLIT_ALIASES,
    is_message,
    is_missing,
    parse_turns,
)

# Names, and words in names, of columns that say which answers are good
FEEDBACK_NAMES = re.compile(
    r"label|weight|train|training|loss|(.*[^a-z])?(kto|good|bad|chosen|preferred|accepted|approved|"
    r"(in)?correct\w*|desirable|passed|feedback|ratings?|scores?|rewards?|quality|thumbs|winner|"
    r"helpful\w*|verdict|status|flagged|stars|upvotes|votes|toxic\w*)([^a-z].*)?"
)
REJECTED_NAMES = re.compile(
    r"reject|non_?preferred|dispreferred|(^|_)(bad|negative|worse|worst|loser|incorrect|wrong)(_|$)"
)
ANSWER_DETAILS = re.compile(r"(score|rating|model|reward|logprobs?|rank|id)s?$")
CHOSEN_NAMES = re.compile(r"^(chosen|preferred)(?!.*reject)")
SPEAKER_COLUMNS = frozenset(("role", "from", "speaker", "author"))
# Columns that say where a row comes from, but nothing about its answer
METADATA_NAMES = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|guid|hash|md5|sha256|url|urls|uri|link|links|split|subset|"
    r"dataset|license|author|user_name|username|model|model_name|generator|version|difficulty|date|"
    r"time|timestamp|created|created_at|updated|updated_at|year|views|length|tokens|"
    r"count)|(num|n)_[a-z_]+|unnamed: \d+|__index_level_\d+__"
)
URL = re.compile(r"https?://\S+")
MAX_METADATA_TERMS = 3  # a longer text is more than an id, a category or an address
MIN_CONSTANT_ROWS = 20  # a column with one value in as many rows does not decide the answer
PREFERENCE_NOTE = (
    "This is preference data. Training uses the chosen answers; the rejected ones are only "
    "compared with them, to find where the answers begin."
)
FEEDBACK_NOTE = (
    "`{name}` seems to say which answers are good. It is not used: bad answers are trained like "
    "the others. Remove them from the file first."
)
REJECTED_NOTE = (
    "`{name}` seems to hold rejected answers, but no column holds the chosen ones. Check which "
    "answers are trained."
)
SPEAKER_NOTE = "`{name}` seems to name a speaker, so each row may be one message of a conversation."
MIXED_TEXT_NOTE = (
    "Some texts hold marks of a chat template, such as {example}. All of the text is used, and not "
    "only the answers in it."
)
NAME_NOTE = "The column `{name}` cannot be used: its name is too long or holds control characters."
RENDERED_NOTE = (
    "The text was rendered with a chat template ({template}). It is read as conversations, so only "
    "the answers are trained. Choose plain text to train on all of it."
)
UNUSED_NOTE = "Some columns are not used: {names}. Check whether the answer depends on them."
HEADINGS_NOTE = (
    "The texts hold headings of speakers or parts, such as {example}. All of the text is trained, "
    "and not only the answers in it."
)
INDEX_NOTE = (
    "`{name}` seems to number the choices from 1. It is read as an index from 0; subtract one, or "
    "write the label, such as A."
)
GUESS_NOTE = "The names of the columns do not say which one is the prompt and which the answer."
NO_PARTS_NOTE = "No two columns hold texts. Found {columns}."


def guess_mapping(sample: Sequence[Record]) -> ColumnMapping:
    """The most likely mapping, judged by the column names and their values. It is certain if the
    columns that it leaves out are known to say nothing about the answer.
    """
    all_names = list(dict.fromkeys(name for record in sample for name in record))
    names = [name for name in all_names if is_valid_column_name(name)]
    split = next(
        (n for n in names if n.lower() == "split" and any(is_split(r.get(n)) for r in sample)), ""
    )
    lower: dict[str, str] = {}
    for name in names:
        if name != split:
            lower.setdefault(name.strip().lower(), name)
    mapping = (
        guess_preference(sample, lower)
        or guess_conversation(sample, names, lower)
        or guess_chain(lower)
        or guess_alpaca(lower)
        or guess_pair_or_text(sample, [name for name in names if name != split], lower)
    )
    note = mapping.note
    if mapping.is_complete and not note:
        note = find_doubt(sample, mapping, [name for name in all_names if name != split])
    return ColumnMapping(
        mapping.row_format, mapping.columns, split, mapping.is_certain and not note, note
    )


def find_doubt(sample: Sequence[Record], mapping: ColumnMapping, names: Sequence[str]) -> str:
    """Why a mapping may be wrong, judged by the columns that it does not use, or an empty text."""
    used = mapping.columns.values()
    unused = [name for name in names if name not in used and has_value(sample, name)]
    for name in unused:
        if note := get_doubtful_name_note(name):
            return note.format(name=clean_text(name)[:40])
    for name in used if mapping.row_format in ("text", "pairs", "alpaca") else ():
        marks = (SPECIAL_TOKENS.search(str(record.get(name) or "")) for record in sample)
        if example := next(filter(None, marks), None):
            return MIXED_TEXT_NOTE.format(example=example[0])
    if mapping.row_format == "text":
        texts = [str(record.get(mapping.columns["text"]) or "") for record in sample]
        if headings := find_headings(texts):
            return HEADINGS_NOTE.format(example=" and ".join(headings[:2]))
    if "choices" in mapping.columns and is_counted_from_one(sample, mapping):
        return INDEX_NOTE.format(name=mapping.columns["completion"][:40])
    skipped = [f"`{name[:40]}`" for name in unused if may_decide_answer(sample, mapping, name)]
    return UNUSED_NOTE.format(names=", ".join(skipped[:5])) if skipped else ""


def is_counted_from_one(sample: Sequence[Record], mapping: ColumnMapping) -> bool:
    """Whether the answers are integers that seem to number the choices from 1."""
    answers = [record.get(mapping.columns["completion"]) for record in sample]
    sizes = [
        len(choices) if isinstance(choices := record.get(mapping.columns["choices"]), list) else 0
        for record in sample
    ]
    numbers = [answer for answer in answers if type(answer) is int]
    return bool(numbers) and 0 not in numbers and any(map(operator.eq, answers, sizes))


def get_doubtful_name_note(name: str) -> str:
    """What the name of an unused column says against the mapping, or an empty text."""
    if not is_valid_column_name(name):
        return NAME_NOTE
    if REJECTED_NAMES.search(name.lower()):
        return REJECTED_NOTE
    if FEEDBACK_NAMES.fullmatch(name.lower()):
        return FEEDBACK_NOTE
    return SPEAKER_NOTE if name.lower() in SPEAKER_COLUMNS else ""


def has_value(sample: Sequence[Record], name: str) -> bool:
    return any(not is_missing(record.get(name)) for record in sample)


def find_part(part: str, lower: Mapping[str, str], used: Sequence[str] = ()) -> dict[str, str]:
    """`{part: column}`, or nothing if no column has one of the part's names."""
    column = next(
        (lower[name] for name in PART_ALIASES[part] if name in lower and lower[name] not in used),
        "",
    )
    return {part: column} if column else {}


def guess_preference(sample: Sequence[Record], lower: Mapping[str, str]) -> ColumnMapping | None:
    rejected = find_answer_column(sample, lower, "rejected", REJECTED_NAMES)
    chosen = find_answer_column(sample, lower, "chosen", CHOSEN_NAMES)
    if not chosen or not rejected:
        return None
    columns = {"chosen": chosen, "rejected": rejected}
    answers = [n for key, n in lower.items() if REJECTED_NAMES.search(key) or "chosen" in key]
    conversations = (
        {"prompt": name}
        for name in lower.values()
        if name not in answers and find_message_kind(sample, name)
    )
    columns |= find_part("prompt", lower, answers) or next(conversations, {})
    columns |= find_part("input", lower, list(columns.values()))
    columns |= find_part("system", lower) | find_part("tools", lower)
    return ColumnMapping("preference", columns, note=PREFERENCE_NOTE)


def find_answer_column(
    sample: Sequence[Record], lower: Mapping[str, str], part: str, pattern: re.Pattern[str]
) -> str:
    """The column of the chosen or rejected answers, or an empty text. Columns with their scores or
    models are left aside.
    """
    names = [
        name
        for key, name in lower.items()
        if pattern.search(key)
        and not ANSWER_DETAILS.search(key)
        and any(isinstance(record.get(name), str | list | dict) for record in sample)
    ]
    return lower[part] if lower.get(part) in names else next(iter(names), "")


def guess_conversation(
    sample: Sequence[Record], names: Sequence[str], lower: Mapping[str, str]
) -> ColumnMapping | None:
    """The first column that holds lists of messages; two of them are a prompt and a completion."""
    columns_by_name = {name: kind for name in names if (kind := find_message_kind(sample, name))}
    pair = find_part("prompt", lower) | find_part("completion", lower)
    if len(pair) == 2 and columns_by_name and set(columns_by_name) <= set(pair.values()):
        return ColumnMapping("pairs", pair | find_part("system", lower) | find_part("tools", lower))
    if not columns_by_name:
        if "messages" not in lower:
            return None
        columns_by_name = {lower["messages"]: "messages"}
    column = next(iter(columns_by_name))
    row_format = "sharegpt" if columns_by_name[column] == "sharegpt" else "messages"
    columns = {ROW_FORMAT_PARTS[row_format][0][0]: column}
    used = list(columns.values())
    columns |= find_part("system", lower, used) | find_part("tools", lower, used)
    note = ""
    if len(columns_by_name) > 1:
        others = ", ".join(f"`{name[:40]}`" for name in list(columns_by_name)[1:])
        note = f"Several columns hold messages. `{column[:40]}` is used, and {others} not."
    return ColumnMapping(row_format, columns, note=note)


def find_message_kind(sample: Sequence[Record], name: str) -> str:
    """`messages` or `sharegpt` if the column holds lists of messages, else an empty text. In a few
    rows it may hold something else, which the check reports.
    """
    kinds = Counter(
        find_turns_kind(record[name]) for record in sample if not is_missing(record.get(name))
    )
    conversations = sum(count for kind, count in kinds.items() if kind)
    if not conversations or 2 * conversations < kinds.total():
        return ""
    return max(("messages", "sharegpt"), key=lambda kind: kinds[kind])


def find_turns_kind(value: Any) -> str:
    try:
        turns = parse_turns(value)
    except BadRow:
        return ""
    if not isinstance(turns, list) or not turns or not is_message(turns[0]):
        return ""
    return "sharegpt" if "from" in turns[0] else "messages"


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
    for part in ("history", "system", "tools"):
        columns |= find_part(part, lower)
    return ColumnMapping("alpaca", columns)


def guess_pair_or_text(
    sample: Sequence[Record], names: Sequence[str], lower: Mapping[str, str]
) -> ColumnMapping:
    if sample and all(is_message(record) for record in sample):
        speaker = next(lower[key] for key in ROLE_KEYS if key in lower)
        content = next((lower[key] for key in CONTENT_KEYS if key in lower), speaker)
        return ColumnMapping("text", {"text": content}, note=SPEAKER_NOTE.format(name=speaker))
    completion = find_part("completion", lower)
    prompt = find_part("prompt", lower, list(completion.values()))
    other_parts = {
        key: name
        for part in ("context", "choices", "system", "tools")
        for key, name in find_part(part, lower).items()
    }
    if prompt and completion:
        return ColumnMapping("pairs", prompt | completion | other_parts)
    if completion and "context" in other_parts:  # the question is in the context
        columns = {"prompt": other_parts.pop("context")} | completion | other_parts
        return ColumnMapping("pairs", columns, note=GUESS_NOTE)
    text_columns = [
        name
        for name in names
        if any(isinstance(record.get(name), str) for record in sample)
        and name not in other_parts.values()
        and not METADATA_NAMES.fullmatch(name.strip().lower())
    ]
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
            "pairs", {"prompt": question, "completion": answer} | other_parts, note=GUESS_NOTE
        )
    columns_by_name = [f"`{name[:40]}` ({describe_type(sample, name)})" for name in names[:5]]
    note = NO_PARTS_NOTE.format(columns=", ".join(columns_by_name) or "no column")
    return ColumnMapping("pairs", {}, note=note)


def describe_type(sample: Sequence[Record], name: str) -> str:
    """What a column holds in the first row that has a value."""
    value = next((r[name] for r in sample if not is_missing(r.get(name))), None)
    kinds = {list: "lists", dict: "objects", str: "texts", bool: "true or false"}
    return kinds.get(type(value), "empty" if value is None else "numbers")


def guess_text(sample: Sequence[Record], column: str) -> ColumnMapping:
    """Plain text, or text that was rendered with a well-known chat template."""
    texts = [record[column] for record in sample if isinstance(record.get(column), str)]
    templates = [find_template(text) for text in texts]
    if not templates or not all(templates):
        return ColumnMapping("text", {"text": column})
    names = dict.fromkeys(template.name for template in templates if template)
    note = RENDERED_NOTE.format(template=", ".join(names))
    return ColumnMapping("rendered", {"text": column}, note=note)


def is_split(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in SPLIT_ALIASES


def may_decide_answer(sample: Sequence[Record], mapping: ColumnMapping, name: str) -> bool:
    """Whether the answers may depend on an unused column: it holds sentences, lists or objects, or
    neither its values, its name nor the row format say that it is metadata.
    """
    values = [value for record in sample if not is_missing(value := record.get(name))]
    if is_row_index(values) or is_repeated_text(sample, mapping, name):
        return False
    if any(isinstance(value, list | dict) for value in values):
        return True
    word_count = sum(len(value.split()) for value in values if isinstance(value, str))
    if word_count >= MAX_METADATA_TERMS * len(values) or is_part_name(name):
        return True
    is_constant = len(values) == len(sample) and all(value == values[0] for value in values)
    return not (
        (is_constant and len(values) >= MIN_CONSTANT_ROWS)
        or all(isinstance(value, str) and URL.fullmatch(value) for value in values)
        or mapping.row_format in ("messages", "sharegpt")  # a conversation is complete
        or (mapping.row_format == "alpaca" and name.lower() == "category")  # Dolly's
        or METADATA_NAMES.fullmatch(name.strip().lower()) is not None
    )


def is_part_name(name: str) -> bool:
    """Whether the column is named like a part besides prompt and answer, such as `context`."""
    return any(name.strip().lower() in PART_ALIASES[part] for part in PART_QUESTIONS)


def is_repeated_text(sample: Sequence[Record], mapping: ColumnMapping, name: str) -> bool:
    """Whether the column repeats what the row trains on anyway, as Alpaca's `text` does: in every
    row it is one of the texts that are used, or holds all of them.
    """
    for record in sample:
        value = record.get(name)
        if is_missing(value):
            continue
        texts = [text for column in mapping.columns.values() for text in list_texts(record, column)]
        is_repeated = isinstance(value, str) and (
            value in texts or (len(texts) > 1 and all(text in value for text in texts))
        )
        if not is_repeated:
            return False
    return True


def list_texts(record: Record, column: str) -> list[str]:
    """The texts of a column, or the contents of its messages."""
    value = parse_turns(record.get(column))
    turns = value if isinstance(value, list) else [value]
    texts = (
        next((turn[key] for key in CONTENT_KEYS if turn.get(key)), "")
        if isinstance(turn, Mapping)
        else turn
        for turn in turns
    )
    return [text for text in texts if isinstance(text, str) and text.strip()]


def is_row_index(values: Sequence[Any]) -> bool:
    """Whether the values count the rows, as the index in pandas' `to_csv` does."""
    texts = [str(value) for value in values]
    if len(texts) < 2 or not all(text.isdecimal() and len(text) < 10 for text in texts):
        return False
    return all(int(second) - int(first) == 1 for first, second in pairwise(texts))


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
