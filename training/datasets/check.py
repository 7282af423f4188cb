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

from training.datasets.column_mapping import ColumnMapping, to_row
from training.datasets.formats import Format
from training.datasets.insights import Insights
from training.datasets.records import iter_records
from training.datasets.rows import MAX_ROW_BYTES, BadRow, Row
from training.datasets.similar import Signatures, find_repeats, hash_text, normalize_text
from training.errors import TooLarge
from training.formatting import format_binary_bytes

MAX_LISTED_PROBLEMS = 100
MAX_PROBLEM_GROUPS = 50
MAX_LISTED_NEAR_DUPLICATES = 10
MAX_ROWS = 2_000_000  # 85 bytes a row here, and what sorting them takes
SPLIT_CODES = {"": 0, "train": 1, "eval": 2, "test": 3}
PROGRESS_INTERVAL = 0.3
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True)
class Source:
    """A file, how to read it, and the split that all its rows belong to (empty: as the rows
    say).
    """

    path: Path
    file_format: Format
    split: str = ""
    name: str = ""


@dataclass
class Problems:
    """Faults counted, grouped by what they have in common, and the first hundred kept."""

    messages: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    count: int = 0
    unread_after: str = ""  # the place behind which nothing could be read

    def add_problem(self, location: str, bad: BadRow) -> None:
        self.count += 1
        self.unread_after = self.unread_after or (location if bad.is_fatal else "")
        if len(self.messages) < MAX_LISTED_PROBLEMS:
            self.messages.append(
                f"{location}: {bad.message}"
                if not bad.message.startswith("message ")
                else f"{location}, {bad.message}"
            )
        group = self.groups.setdefault(
            bad.group if len(self.groups) < MAX_PROBLEM_GROUPS else "other faults",
            {"count": 0, "places": []},
        )
        group["count"] += 1
        if len(group["places"]) < 5:
            group["places"].append(location)

    def to_dict(self) -> dict[str, Any]:
        groups = sorted(self.groups.items(), key=lambda item: -item[1]["count"])
        return {
            "count": self.count,
            "shown": self.messages,
            "unread": self.unread_after,
            "groups": [{"words": description, **group} for description, group in groups],
        }


@dataclass
class Facts:
    """A few numbers of every usable row."""

    location_index: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)

    def to_arrays(self) -> dict[str, Any]:
        dtypes = {
            "location_index": np.uint8,
            "line": np.int64,
            "split": np.uint8,
            "content": np.uint64,
            "prompt": np.uint64,
        }
        return {
            name: np.asarray(getattr(self, name), dtype=dtype) for name, dtype in dtypes.items()
        }


class Staging:
    """Collects packed facts, so that a million rows are not a million Python integers."""

    def __init__(self) -> None:
        self.current = Facts()
        self.packed: list[dict[str, Any]] = []
        self.count = 0
        self.location_prefixes: list[
            str
        ] = []  # "line", or "held.jsonl, line" where there are several files

    def add_row(self, location_prefix: str, line: int, row: Row, content: str) -> None:
        if not self.location_prefixes or self.location_prefixes[-1] != location_prefix:
            self.location_prefixes.append(location_prefix)
        self.current.location_index.append(len(self.location_prefixes) - 1)
        self.current.line.append(line)
        self.current.split.append(SPLIT_CODES[row.split])
        self.current.content.append(hash_text(content))
        self.current.prompt.append(hash_text(normalize_text(get_prompt(row))))
        self.count += 1
        if len(self.current.line) >= 10_000:
            self.packed.append(self.current.to_arrays())
            self.current = Facts()

    def collect_arrays(self) -> dict[str, Any]:
        parts = [*self.packed, self.current.to_arrays()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_sources(
    sources: Iterable[Source],
    mapping: ColumnMapping,
    staging_folder: Path,
    *,
    max_bytes: int,
    report_progress: ProgressCallback,
) -> dict[str, Any]:
    """Read all sources and stage their good rows in `into`; returns the report.

    Raises:
        BadFile: a file cannot be read further.
        TooLarge: more than MAX_ROWS rows.
    """
    sources = list(sources)
    problems, staging, insights, signatures = Problems(), Staging(), Insights(), Signatures()
    reported_at, written_bytes = time.monotonic(), 0
    with (staging_folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for source in sources:
            location_prefix = format_location_prefix(source, len(sources) > 1)
            for number, record in iter_records(
                source.path, source.file_format, max_bytes=max_bytes
            ):
                location = f"{location_prefix} {number}"
                row = parse_record(record, mapping, source.split)
                if isinstance(row, BadRow):
                    problems.add_problem(location, row)
                else:
                    content, text = row.to_json(), get_searchable_text(row)
                    written_bytes += out.write(content + "\n")
                    staging.add_row(location_prefix, number, row, content)
                    insights.add_row(location, row, text)
                    signatures.add_text(text)
                if staging.count + problems.count > MAX_ROWS or written_bytes > max_bytes:
                    raise TooLarge(
                        f"The data has more than {MAX_ROWS:,} rows or "
                        f"{format_binary_bytes(max_bytes)}; split it.",
                        field="file",
                    )
                if time.monotonic() - reported_at > PROGRESS_INTERVAL:
                    reported_at = time.monotonic()
                    report_progress(0.0, f"{staging.count + problems.count:,} rows read")
    report_progress(0.0, "comparing rows")
    facts = staging.collect_arrays()
    facts["alike"] = signatures.find_near_duplicates()
    np.savez(staging_folder / "facts.npz", **facts)
    return build_report(facts, problems, insights, staging.location_prefixes)


def build_report(
    facts: dict[str, Any], problems: Problems, insights: Insights, location_prefixes: list[str]
) -> dict[str, Any]:
    def format_location(row: Any) -> str:
        return f"{location_prefixes[facts['location_index'][row]]} {facts['line'][row]:,}"

    is_repeat = find_repeats(facts["content"])
    near_duplicates = np.flatnonzero((facts["alike"] >= 0) & ~is_repeat)
    return {
        "rows": len(facts["content"]),
        "problems": problems.to_dict(),
        "same": int(is_repeat.sum()),
        "alike": len(near_duplicates),
        "alike_shown": [
            [format_location(facts["alike"][i]), format_location(i)]
            for i in near_duplicates[:MAX_LISTED_NEAR_DUPLICATES]
        ],
        "splits": {
            name: int((facts["split"] == code).sum()) for name, code in SPLIT_CODES.items() if name
        },
        "insights": insights.to_dict(),
    }


def parse_record(record: Any, mapping: ColumnMapping, split: str) -> Row | BadRow:
    """The record as a row of the split, or what is wrong with it."""
    if isinstance(record, BadRow):
        return record
    try:
        row = to_row(record, mapping)
    except BadRow as bad:
        return bad
    except RecursionError:
        return BadRow("the row is nested too deeply")
    if sum(len(message["content"]) for message in row.messages) + len(row.text) > MAX_ROW_BYTES:
        return BadRow(f"the row has more than {format_binary_bytes(MAX_ROW_BYTES)}; split it")
    return Row(row.messages, row.tools, row.text, split) if split else row


def format_location_prefix(source: Source, has_several_files: bool) -> str:
    """What stands before a record's number: `line`, or `held.jsonl, line` where there are several
    files.
    """
    return (
        f"{source.name}, {source.file_format.location_unit}"
        if has_several_files and source.name
        else source.file_format.location_unit
    )


def get_prompt(row: Row) -> str:
    """What stands before the last answer; of plain text its beginning."""
    if row.text:
        return row.text[:200]
    return "\n".join(
        message["content"] for message in row.messages[:-1] if message["role"] != "system"
    )


def get_searchable_text(row: Row) -> str:
    """All that is said in a row but for the system prompt, which is the same in thousands of
    rows.
    """
    return row.text or "\n".join(
        message["content"] for message in row.messages if message["role"] != "system"
    )
