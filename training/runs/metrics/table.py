"""The metrics of a run as a table: CSV, Parquet, or rows for other programs. Cells are never
formulas.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from training.engine.metrics import get_charted_names, get_metric_names
from training.runs.models import CurveChunk, Event, Run
from training.runs.reads import consistent_read

CHUNKS_AT_ONCE = 64  # of 512 steps: about 3 MB in memory


def get_step_columns() -> list[str]:
    return ["step", "time", "total_tokens", *get_charted_names()]


def get_eval_columns() -> list[str]:
    return get_metric_names("eval")


def iter_steps(run: Run) -> Iterator[dict[str, Any]]:
    """Every step in order, with the evaluation of that step if there was one. Superseded steps are
    left out.
    """
    names = get_step_columns()
    with consistent_read():
        evals = {
            event.step: event.fields
            for event in Event.objects.filter(run=run, kind="eval", superseded=False)
            if event.step is not None
        }
        chunk_ids = list(
            CurveChunk.objects.filter(run=run, superseded=False)
            .order_by("first_step")
            .values_list("pk", flat=True)
        )
        # Fewer than the 512 of a chunk
        tail = list(Event.objects.filter(run=run, kind="step", superseded=False).order_by("seq"))
    if 0 in evals:
        yield {"step": 0, "time": None, **get_eval_at(0, evals)}
    # Read in short queries, so that a slow download keeps no transaction open
    for start in range(0, len(chunk_ids), CHUNKS_AT_ONCE):
        chunks = CurveChunk.objects.filter(
            pk__in=chunk_ids[start : start + CHUNKS_AT_ONCE]
        ).order_by("first_step")
        for chunk in chunks.prefetch_related("columns"):
            columns = {
                column.name: np.frombuffer(column.values, dtype=np.float64)
                for column in chunk.columns.all()
            }
            for index in range(chunk.count):
                row: dict[str, Any] = {
                    name: float(columns[name][index]) for name in names if name in columns
                }
                row["step"] = int(row["step"])
                yield row | get_eval_at(int(row["step"]), evals)
    for event in tail:
        row = {name: event.fields.get(name) for name in names}
        row |= {"step": event.step, "time": event.time}
        yield row | get_eval_at(event.step or 0, evals)


def get_eval_at(step: int, evals: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {name: evals[step].get(name) for name in get_eval_columns()} if step in evals else {}


def stream_csv(run: Run) -> Iterator[bytes]:
    """CSV in pieces of about 1,000 steps."""
    names = [*get_step_columns(), *get_eval_columns()]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for count, row in enumerate(iter_steps(run), start=1):
        writer.writerow(row)
        if count % 1000 == 0:
            yield buffer.getvalue().encode()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue().encode()


def encode_parquet(run: Run) -> bytes:
    """One table, float64 except for the step; 88 bytes per step before compression."""
    import pyarrow
    import pyarrow.parquet

    column_types = [
        ("step", pyarrow.int64()),
        *((name, pyarrow.float64()) for name in (*get_step_columns()[1:], *get_eval_columns())),
    ]
    schema = pyarrow.schema(column_types)
    out = pyarrow.BufferOutputStream()
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        rows: list[dict[str, Any]] = []
        for row in iter_steps(run):
            rows.append({name: parse_number(row.get(name)) for name, _ in column_types})
            if len(rows) >= 10_000:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    return bytes(out.getvalue())


def parse_number(value: Any) -> Any:
    """Journals write NaN and infinity as text."""
    return float(value) if isinstance(value, str) else value
