"""Maps the columns of a file to the parts of a row: guesses the mapping from a sample, and converts
records into rows. No files and no ORM here.

Every column is either used or named in `Row.unused`; the check counts these.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.datasets.errors import BadRow, clean_text
from training.datasets.rendered_text import SPECIAL_TOKENS, find_template, parse_rendered_text
from training.datasets.rows import (
    SPLIT_ALIASES,
    Message,
    Row,
    build_row,
    check_split,
    check_text,
    get_role,
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
    "parent": ("parent_id",),
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
# Columns that say which answers are good
FEEDBACK_COLUMNS = frozenset(
    (
        "label",
        "kto_tag",
        "is_good",
        "is_chosen",
        "is_preferred",
        "accepted",
        "feedback",
        "rating",
        "score",
        "reward",
        "thumbs_up",
    )
)
REJECTED_NAMES = re.compile(r"reject|non_?preferred|dispreferred")
CHOSEN_NAMES = re.compile(r"^(chosen|preferred)(?!.*reject)")
SPEAKER_COLUMNS = frozenset(("role", "from", "speaker", "author"))
IDENTIFIER_WORDS = 3  # a column of shorter texts is a name, an id, a category or an address
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
    "Some texts hold marks of a chat template, such as {mark}. All of the text is used, and not "
    "only the answers in it."
)
NAME_NOTE = "The column `{name}` cannot be used: its name is too long or holds control characters."
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
    all_names = list(dict.fromkeys(name for record in sample for name in record))
    names = [name for name in all_names if is_valid_column_name(name)]
    split = next(
        (n for n in names if n.lower() == "split" and any(is_split(r.get(n)) for r in sample)), ""
    )
    lower = {name.strip().lower(): name for name in reversed(names) if name != split}
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
        if mark := next(filter(None, marks), None):
            return MIXED_TEXT_NOTE.format(mark=mark[0])
    skipped = [f"`{name[:40]}`" for name in unused if has_text(sample, name)]
    return UNUSED_NOTE.format(names=", ".join(skipped[:5])) if skipped else ""


def get_doubtful_name_note(name: str) -> str:
    """What the name of an unused column says against the mapping, or an empty text."""
    if not is_valid_column_name(name):
        return NAME_NOTE
    if REJECTED_NAMES.search(name.lower()):
        return REJECTED_NOTE
    if name.lower() in FEEDBACK_COLUMNS:
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
    rejected = next((name for name in lower if REJECTED_NAMES.search(name)), "")
    chosen = next((name for name in lower if CHOSEN_NAMES.search(name)), "")
    if not chosen or not rejected:
        return None
    columns = {"chosen": lower[chosen], "rejected": lower[rejected]}
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
    kinds = {
        find_turns_kind(parse_turns(record[name]))
        for record in sample
        if not is_missing(record.get(name))
    }
    if name == "messages" and len(kinds) > 1:
        return "messages"
    return kinds.pop() if len(kinds) == 1 else ""


def find_turns_kind(turns: Any) -> str:
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
        return ColumnMapping("pairs", columns | system | find_part("tools", lower))
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
    if not templates or not all(templates):
        return ColumnMapping("text", {"text": column})
    names = dict.fromkeys(template.name for template in templates if template)
    note = RENDERED_NOTE.format(template=", ".join(names))
    return ColumnMapping("rendered", {"text": column}, note=note)


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
        is_complete = len(columns) == len(value)  # else a value would be lost
        if is_complete and ({"role", "from"} & columns.keys()) and len(lengths) == 1:
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
    system = get_optional_text(record, system_column)
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
    prompt, completion = (
        parse_messages(record, columns[part]) for part in ("prompt", "completion")
    )
    are_texts = all(isinstance(record.get(columns[p]), str) for p in ("prompt", "completion"))
    # A text that happens to be JSON of messages is a text, unless both of them are.
    if (prompt and completion) or ((prompt or completion) and not are_texts):
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
        answer_text = find_choice(choices, answer_text, columns["completion"])
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


def find_choice(choices: list[tuple[str, str]], answer: str, column: str) -> str:
    """The answer to a multiple choice: a label or text as it is, and an index as its label.

    Raises:
        BadRow: an index that no choice has.
    """
    if answer in {text for choice in choices for text in choice}:
        return answer
    index = re.fullmatch(r"(\d{1,3})(?:\.0)?", answer.strip())
    if index is None:
        return answer
    if int(index[1]) >= len(choices):
        raise BadRow(
            f"`{column}` is {answer}, but there are {len(choices)} choices (from 0)",
            group=f"`{column}` is no index of a choice",
        )
    return choices[int(index[1])][0]


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
    chosen, rejected, prompt = (
        parse_dialog(record, columns.get(part, "")) for part in ("chosen", "rejected", "prompt")
    )
    if chosen is None:
        answer = {"role": "assistant", "content": get_required_text(record, columns["chosen"])}
        question = prompt or [build_user_message(record, columns.get("prompt", "prompt"))]
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
        question = [build_user_message(record, columns.get("prompt", "prompt"))]
        return build_with_system(record, columns, [*mask_messages(question), *messages], split)
    row = build_with_system(record, columns, messages, split)
    text = record.get(columns.get("prompt", ""))
    is_repeated = prompt or any(text == message["content"] for message in row.messages)
    return row if is_repeated else row.with_unused(*list_present(record, columns, ("prompt",)))


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
