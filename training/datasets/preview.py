"""Rows of a version for people to look at. It reads no more of the file than it shows."""

from __future__ import annotations

import json
import random
from itertools import islice
from typing import Any

from training.datasets.models import DatasetVersion

SHOWN_ROWS = 20
LONGEST_SHOWN = 4_000  # characters of one message


def first_rows(version: DatasetVersion, split: str, start: int = 0, count: int = SHOWN_ROWS) -> list[list[dict[str, str]]]:
    """Messages of the rows [start, start + count)."""
    with version.file(split).open(encoding="utf-8") as file:
        return [clipped(json.loads(line)["messages"]) for line in islice(file, start, start + count)]


def random_row(version: DatasetVersion) -> dict[str, Any] | None:
    """A prompt that was not trained on, and its expected answer: from the test split if there is one, else held out."""
    split, count = ("test", version.test_rows) if version.test_rows else ("heldout", version.heldout_rows)
    if not count:
        return None
    messages = first_rows(version, split, random.randrange(count), 1)[0]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[:last], "expected": messages[last]["content"], "split": split}


def clipped(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**message, "content": message["content"][:LONGEST_SHOWN]} for message in messages]
