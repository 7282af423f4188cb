"""First pass over a file: every record checked, the good ones staged, the bad ones named. It knows
no ORM.

Staged are `rows.jsonl`, as the engine will read it, and `facts.npz` with a few bytes a row; both
are all that `build.py` needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.datasets.formats import Format
from training.datasets.forms import Mapped, to_row
from training.datasets.insights import Insights
from training.datasets.records import records
from training.datasets.rows import MAX_ROW_BYTES, BadRow, Row
from training.datasets.similar import Signatures, digest64, folded, repeats
from training.errors import TooLarge
from training.formatting import format_binary_bytes

SHOWN_PROBLEMS = 100
SHOWN_GROUPS = 50
SHOWN_ALIKE = 10
MAX_ROWS = 2_000_000  # 85 bytes a row here, and what sorting them takes
SPLIT_CODES = {"": 0, "train": 1, "heldout": 2, "test": 3}
TELL_SECONDS = 0.3
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Source:
    """A file, how to read it, and the split that all its rows belong to (empty: as the rows
    say).
    """

    path: Path
    form: Format
    split: str = ""
    name: str = ""


@dataclass
class Problems:
    """Faults counted, grouped by what they have in common, and the first hundred kept."""

    shown: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    count: int = 0
    unread: str = ""  # the place behind which nothing could be read

    def add(self, place: str, bad: BadRow) -> None:
        self.count += 1
        self.unread = self.unread or (place if bad.ends else "")
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(
                f"{place}: {bad.message}"
                if not bad.message.startswith("message ")
                else f"{place}, {bad.message}"
            )
        group = self.groups.setdefault(
            bad.group if len(self.groups) < SHOWN_GROUPS else "other faults",
            {"count": 0, "places": []},
        )
        group["count"] += 1
        if len(group["places"]) < 5:
            group["places"].append(place)

    def told(self) -> dict[str, Any]:
        groups = sorted(self.groups.items(), key=lambda item: -item[1]["count"])
        return {
            "count": self.count,
            "shown": self.shown,
            "unread": self.unread,
            "groups": [{"words": words, **group} for words, group in groups],
        }


@dataclass
class Facts:
    """A few numbers of every usable row."""

    place: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)

    def pack(self) -> dict[str, Any]:
        kinds = {
            "place": np.uint8,
            "line": np.int64,
            "split": np.uint8,
            "content": np.uint64,
            "prompt": np.uint64,
        }
        return {name: np.asarray(getattr(self, name), dtype=kind) for name, kind in kinds.items()}


class Staging:
    """Collects packed facts, so that a million rows are not a million Python integers."""

    def __init__(self) -> None:
        self.open = Facts()
        self.packed: list[dict[str, Any]] = []
        self.count = 0
        self.places: list[str] = []  # "line", or "held.jsonl, line" where there are several files

    def add(self, words: str, line: int, row: Row, content: str) -> None:
        if not self.places or self.places[-1] != words:
            self.places.append(words)
        self.open.place.append(len(self.places) - 1)
        self.open.line.append(line)
        self.open.split.append(SPLIT_CODES[row.split])
        self.open.content.append(digest64(content))
        self.open.prompt.append(digest64(folded(prompt_of(row))))
        self.count += 1
        if len(self.open.line) >= 10_000:
            self.packed.append(self.open.pack())
            self.open = Facts()

    def all(self) -> dict[str, Any]:
        parts = [*self.packed, self.open.pack()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check(
    sources: Iterable[Source], mapped: Mapped, into: Path, *, most_bytes: int, tell: Tell
) -> dict[str, Any]:
    """Read all sources and stage their good rows in `into`; returns the report.

    Raises:
        BadFile: a file cannot be read further.
        TooLarge: more than MAX_ROWS rows.
    """
    sources = list(sources)
    problems, staging, insights, signatures = Problems(), Staging(), Insights(), Signatures()
    told_at, written = time.monotonic(), 0
    with (into / "rows.jsonl").open("w", encoding="utf-8") as out:
        for source in sources:
            words = place_words(source, len(sources) > 1)
            for number, found in records(source.path, source.form, most_bytes=most_bytes):
                place = f"{words} {number}"
                row = row_of(found, mapped, source.split)
                if isinstance(row, BadRow):
                    problems.add(place, row)
                else:
                    content, text = row.to_json(), words_of(row)
                    written += out.write(content + "\n")
                    staging.add(words, number, row, content)
                    insights.add(place, row, text)
                    signatures.add(text)
                if staging.count + problems.count > MAX_ROWS or written > most_bytes:
                    raise TooLarge(
                        f"The data has more than {MAX_ROWS:,} rows or "
                        f"{format_binary_bytes(most_bytes)}; split it.",
                        field="file",
                    )
                if time.monotonic() - told_at > TELL_SECONDS:
                    told_at = time.monotonic()
                    tell(0.0, f"{staging.count + problems.count:,} rows read")
    tell(0.0, "comparing rows")
    facts = staging.all()
    facts["alike"] = signatures.alike()
    np.savez(into / "facts.npz", **facts)
    return report(facts, problems, insights, staging.places)


def report(
    facts: dict[str, Any], problems: Problems, insights: Insights, places: list[str]
) -> dict[str, Any]:
    def name(row: Any) -> str:
        return f"{places[facts['place'][row]]} {facts['line'][row]:,}"

    again = repeats(facts["content"])
    alike = np.flatnonzero((facts["alike"] >= 0) & ~again)
    return {
        "rows": len(facts["content"]),
        "problems": problems.told(),
        "same": int(again.sum()),
        "alike": len(alike),
        "alike_shown": [[name(facts["alike"][i]), name(i)] for i in alike[:SHOWN_ALIKE]],
        "splits": {
            name: int((facts["split"] == code).sum()) for name, code in SPLIT_CODES.items() if name
        },
        "insights": insights.told(),
    }


def row_of(found: Any, mapped: Mapped, split: str) -> Row | BadRow:
    """The record as a row of the split, or what is wrong with it."""
    if isinstance(found, BadRow):
        return found
    try:
        row = to_row(found, mapped)
    except BadRow as bad:
        return bad
    except RecursionError:
        return BadRow("the row is nested too deeply")
    if sum(len(message["content"]) for message in row.messages) + len(row.text) > MAX_ROW_BYTES:
        return BadRow(f"the row has more than {format_binary_bytes(MAX_ROW_BYTES)}; split it")
    return Row(row.messages, row.tools, row.text, split) if split else row


def place_words(source: Source, several: bool) -> str:
    """What stands before a record's number: `line`, or `held.jsonl, line` where there are several
    files.
    """
    return f"{source.name}, {source.form.place}" if several and source.name else source.form.place


def prompt_of(row: Row) -> str:
    """What stands before the last answer; of plain text its beginning."""
    if row.text:
        return row.text[:200]
    return "\n".join(
        message["content"] for message in row.messages[:-1] if message["role"] != "system"
    )


def words_of(row: Row) -> str:
    """All that is said in a row but for the system prompt, which is the same in thousands of
    rows.
    """
    return row.text or "\n".join(
        message["content"] for message in row.messages if message["role"] != "system"
    )
