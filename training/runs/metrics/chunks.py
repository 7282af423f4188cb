"""Store 512 step events as one chunk: a float64 column per metric, with its low, high and mean.

A chart of a million steps then reads 1,954 small summaries instead of every point. A spike shows in
the low or high of its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from django.db.models import Count
from numpy.typing import NDArray

from training.engine.metrics import get_metric_names
from training.runs.models import CurveChunk, CurveColumn, Event

CHUNK_SIZE = 512
COORDINATES = ("seq", "step", "time")
Column = NDArray[np.float64]


def compact_steps(run_id: int) -> None:
    """Move complete chunks of step events out of the event table. The newest events, fewer than
    CHUNK_SIZE, stay rows.

    Called in the transaction that stored them.
    """
    counts = (
        Event.objects.filter(run_id=run_id, kind="step")
        .values("superseded")
        .annotate(count=Count("pk"))
        .order_by()
    )
    for group in counts:
        for _ in range(group["count"] // CHUNK_SIZE):
            rows = list(
                Event.objects.filter(run_id=run_id, kind="step", superseded=group["superseded"])[
                    :CHUNK_SIZE
                ]
            )
            write_chunk(run_id, build_columns(rows), superseded=group["superseded"])
            Event.objects.filter(pk__in=[row.pk for row in rows]).delete()


def build_columns(rows: Sequence[Event]) -> dict[str, Column]:
    """Step events as float64 columns of length len(rows). Per-device memory is not kept, only its
    sum.
    """
    columns = {name: [float(getattr(row, name)) for row in rows] for name in COORDINATES}
    columns |= {
        name: [float(row.fields.get(name, "nan")) for row in rows]
        for name in get_metric_names("step")
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def write_chunk(run_id: int, columns: dict[str, Column], *, superseded: bool = False) -> None:
    seq, step = columns["seq"], columns["step"]
    chunk = CurveChunk.objects.create(
        run_id=run_id,
        first_seq=int(seq[0]),
        last_seq=int(seq[-1]),
        first_step=int(step.min()),
        last_step=int(step.max()),
        count=len(seq),
        superseded=superseded,
    )
    CurveColumn.objects.bulk_create(
        [build_column_row(chunk, name, values) for name, values in columns.items()]
    )


def build_column_row(chunk: CurveChunk, name: str, values: Column) -> CurveColumn:
    finite = values[np.isfinite(values)]
    low, high, mean = (
        (finite.min(), finite.max(), finite.mean()) if len(finite) else (None, None, None)
    )
    return CurveColumn(
        chunk=chunk, name=name, low=low, high=high, mean=mean, values=values.tobytes()
    )


def read_columns(chunk: CurveChunk) -> dict[str, Column]:
    """Columns by name. A chunk from before a metric was added has no column for it."""
    rows = CurveColumn.objects.filter(
        chunk=chunk, name__in=[*COORDINATES, *get_metric_names("step")]
    )
    return {row.name: np.frombuffer(bytes(row.values), dtype=np.float64) for row in rows}


def read_chunk_events(chunk: CurveChunk) -> list[Event]:
    """The step events of a chunk, in order."""
    columns = read_columns(chunk)
    metrics = [name for name in columns if name not in COORDINATES]
    events = []
    for index in range(chunk.count):
        fields = {name: to_journal_number(columns[name][index]) for name in metrics}
        events.append(
            Event(
                run_id=chunk.run_id,
                seq=int(columns["seq"][index]),
                kind="step",
                step=int(columns["step"][index]),
                time=float(columns["time"][index]),
                fields=fields,
                superseded=chunk.superseded,
            )
        )
    return events


def to_journal_number(value: float) -> float | int | str:
    """As the journal writes it: whole numbers as int, values that are not finite as text."""
    if not np.isfinite(value):
        return repr(float(value))
    return int(value) if float(value).is_integer() and abs(value) > 1 else float(value)
