"""The row formats, and the columns of a file that hold the parts of a row. No files and no ORM
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.datasets.errors import clean_text
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
        ("tools", False),
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
    "preference": (
        ("prompt", False),
        ("input", False),
        ("chosen", True),
        ("rejected", False),
        ("system", False),
        ("tools", False),
    ),
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
        "problem",
        "document",
        "article",
        "dialogue",
        "text",
        "sentence",
        "source",
        "description",
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
        "answerkey",
        "highlights",
        "solution",
    ),
    "output": ("output", "response", "completion", "answer"),
    "input": ("input", "context"),
    "context": ("context", "passage"),
    "choices": ("choices", "options"),
    "history": ("history",),
    "system": (
        "system",
        "system_prompt",
        "system_message",
        "system_instruction",
        "systeminstruction",
    ),
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
