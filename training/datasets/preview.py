"""Rows to display: of a version, and of an upload under a mapping. Reads no more of a file than is
shown.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from training.datasets.chains import link_rows
from training.datasets.check import UnusedValues, parse_record
from training.datasets.column_mapping import ColumnMapping
from training.datasets.errors import BadRow
from training.datasets.models import DatasetVersion, Upload
from training.datasets.rows import Row
from training.datasets.uploads import get_file_format, load_sample

ROWS_PER_PAGE = 10
MAX_PREVIEW_ROWS = 8
MAX_PAGE_CHARACTERS = 2_000_000  # in the rows of one page
MAX_TURNS = 50
MAX_MESSAGE_CHARACTERS = 4_000  # characters of one message
Turn = dict[str, str]


def load_rows(version: DatasetVersion, split: str, start: int, count: int) -> list[dict[str, Any]]:
    """The rows [start, start + count) as the engine reads them: fewer if they are huge, but at
    least one.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    with version.split_path(split).open(encoding="utf-8") as file:
        for line in islice(file, start, start + count):
            size += len(line)
            if rows and size > MAX_PAGE_CHARACTERS:
                break
            rows.append(json.loads(line))
    return rows


def load_turns(
    version: DatasetVersion, split: str, start: int = 0, count: int = ROWS_PER_PAGE
) -> list[list[Turn]]:
    """The rows [start, start + count) as turns."""
    return [format_turns(row) for row in load_rows(version, split, start, count)]


def format_turns(row: Mapping[str, Any]) -> list[Turn]:
    """A row as turns of text: tool calls as JSON, plain text as a single turn."""
    if row.get("text"):
        return [{"role": "text", "content": row["text"][:MAX_MESSAGE_CHARACTERS]}]
    turns = []
    if row.get("tools"):
        turns.append(
            {
                "role": "tools",
                "content": json.dumps(row["tools"], ensure_ascii=False)[:MAX_MESSAGE_CHARACTERS],
            }
        )
    for message in row["messages"][:MAX_TURNS]:
        if reasoning := message.get("reasoning_content"):
            turns.append({"role": "reasoning", "content": reasoning[:MAX_MESSAGE_CHARACTERS]})
        content = format_message(message)[:MAX_MESSAGE_CHARACTERS]
        turn = {"role": message["role"], "content": content}
        if message.get("weight") == 0:
            turn["who"] = f"{message['role']}, not trained"
        turns.append(turn)
    if (hidden_count := len(row["messages"]) - MAX_TURNS) > 0:
        turns.append({"role": "text", "content": f"… {hidden_count:,} more messages"})
    return turns


def format_message(message: Mapping[str, Any]) -> str:
    """A message's text, followed by its tool calls as JSON."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def preview_rows(upload: Upload, mapping: ColumnMapping) -> list[dict[str, Any]]:
    """The first records of an upload as rows, or the reason why a record is invalid."""
    location_unit = get_file_format(upload).location_unit
    previews: list[dict[str, Any]] = []
    records: Iterable[tuple[int, dict[str, Any] | BadRow]] = (
        (number, BadRow(fault) if record is None else record)
        for number, record, fault in load_sample(upload)
    )
    if mapping.row_format == "chain":
        records = link_rows(records, mapping, ":memory:")
    for number, record in islice(records, MAX_PREVIEW_ROWS):
        row = parse_record(record, mapping, "")
        problem = row.message if isinstance(row, BadRow) else ""
        turns = [] if isinstance(row, BadRow) else format_turns(json.loads(row.to_json()))
        split = "" if isinstance(row, BadRow) else row.split
        previews.append(
            {
                "location": f"{location_unit} {number}",
                "problem": problem,
                "turns": turns,
                "split": split,
            }
        )
    return previews


def list_unused_columns(upload: Upload, mapping: ColumnMapping) -> list[dict[str, Any]]:
    """The columns and message keys of the sample that are not used, with the rows that have one."""
    unused = UnusedValues(mapping)
    for _, record, _ in load_sample(upload):
        row = parse_record(record, mapping, "") if record is not None else None
        if isinstance(row, Row):
            unused.add_row(row)
    return unused.to_list()


def get_random_prompt(version: DatasetVersion) -> dict[str, Any] | None:
    """A random prompt that was not trained on, with its expected answer: from the test split if
    there is one, otherwise from the eval split.
    """
    split, count = get_eval_split(version)
    return (
        split_prompt(load_rows(version, split, random.randrange(count), 1)[0], split)
        if count
        else None
    )


def sample_eval_prompts(version: DatasetVersion, max_count: int) -> list[dict[str, Any]]:
    """Up to `max_count` such prompts, evenly spaced over the split and the same every time."""
    split, count = get_eval_split(version)
    sample_count = min(max_count, count)
    indices = {
        round(index * (count - 1) / max(1, sample_count - 1)) for index in range(sample_count)
    }
    if not indices:
        return []
    with version.split_path(split).open(encoding="utf-8") as file:
        return [
            split_prompt(json.loads(line), split)
            for index, line in enumerate(file)
            if index in indices
        ]


def get_eval_split(version: DatasetVersion) -> tuple[str, int]:
    return ("test", version.test_rows) if version.test_rows else ("eval", version.eval_rows)


def split_prompt(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A row's messages before its last answer, and that answer. Plain text is split into halves."""
    if row.get("text"):
        parts = row["text"].split(" ")
        half = max(1, len(parts) // 2)
        question, expected = " ".join(parts[:half]), " ".join(parts[half:])
        return {
            "messages": [{"role": "user", "content": question}],
            "expected": expected,
            "split": split,
        }
    messages = [
        {"role": message["role"], "content": format_message(message)} for message in row["messages"]
    ]
    last = max(
        index
        for index, message in enumerate(row["messages"])
        if message["role"] == "assistant" and message.get("weight") != 0
    )
    return {"messages": messages[:last], "expected": messages[last]["content"], "split": split}
