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
from training.datasets.rows import check_text, is_missing

MAX_TURNS = 500
# What files write for "no parent", if no row has such an id
ROOT_PARENTS = frozenset(("0", "-1", "none", "null", "nan"))
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
            try:
                row_id = normalize_id(record.get(id_column), id_column)
                parent = normalize_id(record.get(parent_column), parent_column) or None
            except BadRow as bad:
                yield line, bad
                continue
            if not row_id:
                yield line, BadRow(f"`{id_column}` is missing")
                continue
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
            yield line, BadRow(f"is in no conversation: the `{parent_column}` values form a cycle")


def normalize_id(value: Any, column: str) -> str:
    """An id as text. pandas writes integers as 3.0 if a cell of the column is empty."""
    if is_missing(value):
        return ""
    return re.sub(r"^(\d+)\.0$", r"\1", check_text(value, column).strip())


def build_conversation(
    index: sqlite3.Connection, leaf: str, mapping: ColumnMapping
) -> NumberedRecord:
    """The record of a leaf with its ancestors' turns under HISTORY_KEY."""
    chain: list[tuple[int, dict[str, Any], bool]] = []
    row_id: str | None = leaf
    problem: BadRow | None = None
    while row_id is not None and problem is None:
        stored = index.execute(
            "SELECT line, record, is_linked, parent FROM rows WHERE id = ?", [row_id]
        ).fetchone()
        if stored is None and row_id.lower() in ROOT_PARENTS:
            break
        if stored is None:
            parent_column = mapping.columns["parent"]
            message = f"`{parent_column}` of line {chain[-1][0]} is `{row_id[:40]}`, no row's id"
            problem = BadRow(message, group=f"`{parent_column}` is no row's id")
            break
        line, record, is_linked, parent = stored
        chain.append((line, json.loads(record), bool(is_linked)))
        if len(chain) > MAX_TURNS:
            problem = BadRow(f"the conversation has more than {MAX_TURNS} rows")
        row_id = parent
    index.executemany("UPDATE rows SET is_linked = 1 WHERE line = ?", [[row[0]] for row in chain])
    (line, record, _), *ancestors = chain
    return line, problem or merge_ancestors(record, ancestors, mapping)


def merge_ancestors(
    record: dict[str, Any],
    ancestors: list[tuple[int, dict[str, Any], bool]],
    mapping: ColumnMapping,
) -> dict[str, Any]:
    """The record with its ancestors' turns under HISTORY_KEY, and with their other values where it
    has none, such as the system message of the first row.
    """
    prompt, completion = mapping.columns["prompt"], mapping.columns["completion"]
    own = {prompt, completion, mapping.columns["id"], mapping.columns["parent"], mapping.split}
    history: list[dict[str, Any]] = []
    inherited: dict[str, Any] = {}
    for _, ancestor, was_trained in reversed(ancestors):
        history += [
            {"role": "user", "content": ancestor.get(prompt)},
            {
                "role": "assistant",
                "content": ancestor.get(completion),
                "weight": 0 if was_trained else 1,
            },
        ]
        inherited |= {k: v for k, v in ancestor.items() if k not in own and not is_missing(v)}
    values = {name: value for name, value in record.items() if not is_missing(value)}
    return {**record, **inherited, **values, HISTORY_KEY: history}
