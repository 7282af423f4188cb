"""First pass over an upload: check every record, stage the valid rows and report the faulty ones.
No ORM here.

The staged files are all that `build.py` needs: `rows.jsonl`, the rows as the engine reads them, and
`facts.npz`, a few bytes per row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from training.datasets.chains import link_rows
from training.datasets.column_mapping import ColumnMapping
from training.datasets.errors import BadRow, clean_text
from training.datasets.formats import Format
from training.datasets.insights import Insights
from training.datasets.json_items import build_row_too_large
from training.datasets.mapping_guess import suggest_part
from training.datasets.records import iter_records
from training.datasets.row_builders import to_row
from training.datasets.rows import MAX_ROW_BYTES, Row
from training.datasets.similar import Signatures, find_repeats, hash_text, normalize_text
from training.errors import TooLarge
from training.formatting import format_binary_bytes

MAX_LISTED_PROBLEMS = 100
MAX_PROBLEM_GROUPS = 50
MAX_LISTED_NEAR_DUPLICATES = 10
MAX_UNUSED_NAMES = 200
MAX_ROWS = 2_000_000  # 85 bytes per row in this process, plus memory for sorting
SPLIT_CODES = {"": 0, "train": 1, "eval": 2, "test": 3}
PROGRESS_INTERVAL = 0.3
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True)
class Source:
    """A file, its format, and the split of all its rows (empty: the rows name their split)."""

    path: Path
    file_format: Format
    split: str = ""
    name: str = ""


@dataclass
class Problems:
    """Faulty rows: counted, grouped by kind, and the first hundred listed."""

    messages: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    count: int = 0
    unread_after: str = ""  # the location after which nothing could be read

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
            bad.group if len(self.groups) < MAX_PROBLEM_GROUPS else "other problems",
            {"count": 0, "locations": []},
        )
        group["count"] += 1
        if len(group["locations"]) < 5:
            group["locations"].append(location)

    def to_dict(self) -> dict[str, Any]:
        groups = sorted(self.groups.items(), key=lambda item: -item[1]["count"])
        return {
            "count": self.count,
            "messages": self.messages,
            "unread_after": self.unread_after,
            "groups": [{"message": message, **group} for message, group in groups],
        }


class UnusedValues:
    """Counts the rows that have a value in a column or a message key that is not used."""

    def __init__(self, mapping: ColumnMapping) -> None:
        self.mapping, self.counts = mapping, Counter[str]()

    def add_row(self, row: Row) -> None:
        for name in row.unused:
            if name in self.counts or len(self.counts) < MAX_UNUSED_NAMES:
                self.counts[name] += 1

    def to_list(self) -> list[dict[str, Any]]:
        """`part` is the part of the row format that the column may fill, or an empty text."""
        return [
            {
                "name": clean_text(name)[:100],
                "count": count,
                "part": suggest_part(self.mapping, name),
            }
            for name, count in self.counts.most_common()
        ]


@dataclass
class Facts:
    """A few numbers for every usable row."""

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
    """Collects the facts of the rows as packed arrays; a million rows as Python integers would take
    much more memory.
    """

    def __init__(self) -> None:
        self.current = Facts()
        self.packed: list[dict[str, Any]] = []
        self.count = 0
        # "line", or "eval.jsonl, line" if there are several files
        self.location_prefixes: list[str] = []

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
    """Read all sources and stage their valid rows in `staging_folder`. Returns the report.

    Raises:
        BadFile: the rest of a file cannot be read.
        TooLarge: more than MAX_ROWS rows or `max_bytes` bytes.
    """
    sources = list(sources)
    problems, staging, insights, signatures = Problems(), Staging(), Insights(), Signatures()
    unused = UnusedValues(mapping)
    reported_at, written_bytes = time.monotonic(), 0
    with (staging_folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for source in sources:
            location_prefix = format_location_prefix(source, len(sources) > 1)
            records = iter_records(source.path, source.file_format, max_bytes=max_bytes)
            index_path = staging_folder / "chain.sqlite3"
            if mapping.row_format == "chain":
                index_path.unlink(missing_ok=True)
                records = link_rows(records, mapping, str(index_path))
            for number, record in records:
                location = f"{location_prefix} {number}"
                row = parse_record(record, mapping, source.split)
                if isinstance(row, BadRow):
                    problems.add_problem(location, row)
                else:
                    content, text = row.to_json(), get_searchable_text(row)
                    written_bytes += out.write(content + "\n")
                    staging.add_row(location_prefix, number, row, content)
                    insights.add_row(location, row, text)
                    unused.add_row(row)
                    signatures.add_text(text)
                if staging.count + problems.count > MAX_ROWS or written_bytes > max_bytes:
                    raise TooLarge(
                        f"The data has more than {MAX_ROWS:,} rows or "
                        f"{format_binary_bytes(max_bytes)}. Split it into smaller uploads.",
                        field="file",
                    )
                if time.monotonic() - reported_at > PROGRESS_INTERVAL:
                    reported_at = time.monotonic()
                    report_progress(0.0, f"{staging.count + problems.count:,} rows read")
            index_path.unlink(missing_ok=True)
    report_progress(0.0, "comparing rows")
    facts = staging.collect_arrays()
    facts["first_similar"] = signatures.find_near_duplicates()
    np.savez(staging_folder / "facts.npz", **facts)
    report = build_report(facts, problems, insights, staging.location_prefixes)
    return {**report, "unused": unused.to_list()}


def build_report(
    facts: dict[str, Any], problems: Problems, insights: Insights, location_prefixes: list[str]
) -> dict[str, Any]:
    def format_location(row: Any) -> str:
        return f"{location_prefixes[facts['location_index'][row]]} {facts['line'][row]:,}"

    is_repeat = find_repeats(facts["content"])
    near_duplicates = np.flatnonzero((facts["first_similar"] >= 0) & ~is_repeat)
    return {
        "rows": len(facts["content"]),
        "problems": problems.to_dict(),
        "duplicates": int(is_repeat.sum()),
        "near_duplicates": len(near_duplicates),
        "near_duplicate_examples": [
            [format_location(facts["first_similar"][i]), format_location(i)]
            for i in near_duplicates[:MAX_LISTED_NEAR_DUPLICATES]
        ],
        "splits": {
            name: int((facts["split"] == code).sum()) for name, code in SPLIT_CODES.items() if name
        },
        "insights": insights.to_dict(),
    }


def parse_record(record: Any, mapping: ColumnMapping, split: str) -> Row | BadRow:
    """The record as a row of the split, or a BadRow with what is wrong."""
    if isinstance(record, BadRow):
        return record
    try:
        row = to_row(record, mapping)
    except BadRow as bad:
        return bad
    except RecursionError:
        return BadRow("the row is nested too deeply")
    if sum(len(message["content"]) for message in row.messages) + len(row.text) > MAX_ROW_BYTES:
        return build_row_too_large()
    return replace(row, split=split) if split else row


def format_location_prefix(source: Source, has_several_files: bool) -> str:
    """The text before a record's number: `line`, or `eval.jsonl, line` with several files."""
    return (
        f"{source.name}, {source.file_format.location_unit}"
        if has_several_files and source.name
        else source.file_format.location_unit
    )


def get_prompt(row: Row) -> str:
    """The messages before the last answer, without system messages; the beginning of plain text."""
    if row.text:
        return row.text[:200]
    return "\n".join(
        message["content"] for message in row.messages[:-1] if message["role"] != "system"
    )


def get_searchable_text(row: Row) -> str:
    """The text of a row without the system prompt, which is often the same in thousands of rows."""
    return row.text or "\n".join(
        message["content"] for message in row.messages if message["role"] != "system"
    )
