"""Links rows by a parent id (H2O's format) into conversations. The rows are indexed in a SQLite
file, so that a large file needs little memory.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from training.datasets.column_mapping import HISTORY_KEY, ColumnMapping
from training.datasets.errors import BadRow
from training.datasets.rows import is_missing

MAX_TURNS = 500
CREATE_INDEX = """
    CREATE TABLE rows (
        id TEXT PRIMARY KEY, parent TEXT, line INTEGER, record TEXT, is_linked INTEGER DEFAULT 0
    ) WITHOUT ROWID
"""
LEAVES = """
    SELECT id FROM rows WHERE id NOT IN (SELECT parent FROM rows WHERE parent IS NOT NULL)
    ORDER BY line
"""
NumberedRecord = tuple[int, dict[str, Any] | BadRow]


def link_rows(
    records: Iterable[NumberedRecord], mapping: ColumnMapping, index_path: str
) -> Iterator[NumberedRecord]:
    """One record for each row that is nobody's parent, with its ancestors as earlier turns. A turn
    that several conversations share is trained in the first of them.
    """
    id_column, parent_column = mapping.columns["id"], mapping.columns["parent"]
    with closing(sqlite3.connect(index_path)) as index:
        index.execute("PRAGMA journal_mode = OFF")
        index.execute("PRAGMA synchronous = OFF")
        index.execute(CREATE_INDEX)
        for line, record in records:
            if isinstance(record, BadRow):
                yield line, record
                continue
            row_id = normalize_id(record.get(id_column))
            if not row_id:
                yield line, BadRow(f"`{id_column}` is missing")
                continue
            parent = normalize_id(record.get(parent_column)) or None
            values = (row_id, parent, line, json.dumps(record))
            try:
                index.execute(
                    "INSERT INTO rows (id, parent, line, record) VALUES (?,?,?,?)", values
                )
            except sqlite3.IntegrityError:
                message = f"the {id_column} `{row_id[:40]}` is used twice"
                yield line, BadRow(message, group=f"an {id_column} is used twice")
        for (leaf,) in index.execute(LEAVES).fetchall():
            yield build_conversation(index, leaf, mapping)
        for (line,) in index.execute("SELECT line FROM rows WHERE NOT is_linked ORDER BY line"):
            message = f"following `{parent_column}` leads back to the same row"
            yield line, BadRow(message)


def normalize_id(value: Any) -> str:
    """An id as text. pandas writes integers as 3.0 if a cell of the column is empty."""
    return "" if is_missing(value) else re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())


def build_conversation(
    index: sqlite3.Connection, leaf: str, mapping: ColumnMapping
) -> NumberedRecord:
    """The record of a leaf with its ancestors' turns under HISTORY_KEY."""
    chain: list[tuple[int, dict[str, Any], bool]] = []
    row_id: str | None = leaf
    while row_id is not None:
        found = index.execute(
            "SELECT line, record, is_linked, parent FROM rows WHERE id = ?", [row_id]
        ).fetchone()
        if found is None:
            line = chain[-1][0]
            index.execute("UPDATE rows SET is_linked = 1 WHERE line = ?", [line])
            parent_column = mapping.columns["parent"]
            message = f"`{parent_column}` is `{row_id[:40]}`, which is no row's id"
            return line, BadRow(message, group=f"`{parent_column}` is no row's id")
        line, record, is_linked, parent = found
        chain.append((line, json.loads(record), bool(is_linked)))
        index.execute("UPDATE rows SET is_linked = 1 WHERE id = ?", [row_id])
        if len(chain) > MAX_TURNS:
            return chain[0][0], BadRow(f"the conversation has more than {MAX_TURNS} rows")
        row_id = parent
    (line, record, _), *ancestors = chain
    history: list[dict[str, Any]] = []
    for _, ancestor, was_trained in reversed(ancestors):
        history += [
            {"role": "user", "content": ancestor.get(mapping.columns["prompt"])},
            {
                "role": "assistant",
                "content": ancestor.get(mapping.columns["completion"]),
                "weight": 0 if was_trained else 1,
            },
        ]
    return line, {**record, HISTORY_KEY: history}
