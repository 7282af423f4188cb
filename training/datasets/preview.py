"""Rows for people to look at: of a version, and of an upload under a mapping. It reads no more of a
file than it shows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import islice
from typing import Any

from training.datasets.check import row_of
from training.datasets.forms import Mapped
from training.datasets.intake import form_of, sample
from training.datasets.models import DatasetVersion, Upload
from training.datasets.rows import BadRow

SHOWN_ROWS = 10
SHOWN_PREVIEWS = 8
MOST_CHARACTERS = 2_000_000  # of the rows of one page
MOST_TURNS = 50
LONGEST_SHOWN = 4_000  # characters of one message
Turn = dict[str, str]


def raw_rows(version: DatasetVersion, split: str, start: int, count: int) -> list[dict[str, Any]]:
    """The rows [start, start + count) as the engine reads them; fewer if they are huge, but one at
    least.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    with version.file(split).open(encoding="utf-8") as file:
        for line in islice(file, start, start + count):
            size += len(line)
            if rows and size > MOST_CHARACTERS:
                break
            rows.append(json.loads(line))
    return rows


def first_rows(
    version: DatasetVersion, split: str, start: int = 0, count: int = SHOWN_ROWS
) -> list[list[Turn]]:
    """The turns of the rows [start, start + count)."""
    return [turns(row) for row in raw_rows(version, split, start, count)]


def turns(row: Mapping[str, Any]) -> list[Turn]:
    """A row as turns of text: a call of a tool as its JSON, plain text as one turn."""
    if row.get("text"):
        return [{"role": "text", "content": row["text"][:LONGEST_SHOWN]}]
    shown = []
    if row.get("tools"):
        shown.append(
            {
                "role": "tools",
                "content": json.dumps(row["tools"], ensure_ascii=False)[:LONGEST_SHOWN],
            }
        )
    for message in row["messages"][:MOST_TURNS]:
        shown.append({"role": message["role"], "content": words_of(message)[:LONGEST_SHOWN]})
    if (more := len(row["messages"]) - MOST_TURNS) > 0:
        shown.append({"role": "text", "content": f"… {more:,} more messages"})
    return shown


def words_of(message: Mapping[str, Any]) -> str:
    """A message's text, and its calls of tools as JSON."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def preview(upload: Upload, mapped: Mapped) -> list[dict[str, Any]]:
    """The first records as rows, or why they are none."""
    place = form_of(upload).place
    shown: list[dict[str, Any]] = []
    for number, record, fault in sample(upload)[:SHOWN_PREVIEWS]:
        row = BadRow(fault) if record is None else row_of(record, mapped, "")
        problem = row.message if isinstance(row, BadRow) else ""
        seen = [] if isinstance(row, BadRow) else turns(json.loads(row.to_json()))
        split = "" if isinstance(row, BadRow) else row.split
        shown.append(
            {"place": f"{place} {number}", "problem": problem, "turns": seen, "split": split}
        )
    return shown


def random_row(version: DatasetVersion) -> dict[str, Any] | None:
    """A prompt that was not trained on, and its expected answer: from the test split if there is
    one, else held out.
    """
    split, count = unseen(version)
    return (
        prompt_of(raw_rows(version, split, random.randrange(count), 1)[0], split) if count else None
    )


def held_out_prompts(version: DatasetVersion, most: int) -> list[dict[str, Any]]:
    """Up to `most` such prompts, spread evenly over the split, the same ones every time."""
    split, count = unseen(version)
    drawn = min(most, count)
    wanted = {round(place * (count - 1) / max(1, drawn - 1)) for place in range(drawn)}
    if not wanted:
        return []
    with version.file(split).open(encoding="utf-8") as file:
        return [
            prompt_of(json.loads(line), split) for place, line in enumerate(file) if place in wanted
        ]


def unseen(version: DatasetVersion) -> tuple[str, int]:
    return ("test", version.test_rows) if version.test_rows else ("heldout", version.heldout_rows)


def prompt_of(row: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A row's conversation before its last answer, and that answer; of plain text its first half
    and its second.
    """
    if row.get("text"):
        words = row["text"].split(" ")
        half = max(1, len(words) // 2)
        asked, expected = " ".join(words[:half]), " ".join(words[half:])
        return {
            "messages": [{"role": "user", "content": asked}],
            "expected": expected,
            "split": split,
        }
    messages = [
        {"role": message["role"], "content": words_of(message)} for message in row["messages"]
    ]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[:last], "expected": messages[last]["content"], "split": split}
