"""A long run, written directly to the tables as if it had been compacted."""

import numpy as np

from training.engine.metrics import get_metric_names
from training.runs.metrics.chunks import CHUNK_SIZE, build_column_row
from training.runs.models import CurveChunk, CurveColumn, Event, Run


def write_long_run(run, *, steps, spikes, height):
    """Complete chunks, and rows for the remaining steps. The loss is `height` at each spike and
    otherwise falls from 3.
    """
    step = np.arange(1, steps + 1, dtype=np.float64)
    metrics = get_metric_names("step")
    columns = dict.fromkeys(metrics, step * 0 + 1) | {"seq": step, "step": step, "time": 1e9 + step}
    columns["loss"] = 0.5 + 2.5 * np.exp(-step / steps * 5)
    columns["loss"][[s - 1 for s in spikes]] = height
    columns["total_tokens"] = step * 512
    chunk_count = steps // CHUNK_SIZE
    chunks = [
        CurveChunk(
            run=run,
            first_seq=i * CHUNK_SIZE + 1,
            last_seq=(i + 1) * CHUNK_SIZE,
            first_step=i * CHUNK_SIZE + 1,
            last_step=(i + 1) * CHUNK_SIZE,
            count=CHUNK_SIZE,
        )
        for i in range(chunk_count)
    ]
    CurveChunk.objects.bulk_create(chunks, batch_size=500)
    for first_chunk in range(0, chunk_count, 100):
        rows = []
        for i in range(first_chunk, min(first_chunk + 100, chunk_count)):
            rows_slice = slice(i * CHUNK_SIZE, (i + 1) * CHUNK_SIZE)
            rows += [
                build_column_row(chunks[i], name, values[rows_slice])
                for name, values in columns.items()
            ]
        CurveColumn.objects.bulk_create(rows)
    Event.objects.bulk_create(
        [
            Event(
                run=run,
                seq=n,
                kind="step",
                step=n,
                time=1e9 + n,
                fields={name: float(columns[name][n - 1]) for name in metrics},
            )
            for n in range(chunk_count * CHUNK_SIZE + 1, steps + 1)
        ]
    )
    Run.objects.filter(pk=run.pk).update(
        last_seq=steps,
        step=steps,
        total_steps=steps,
        state="finished",
        loss=float(columns["loss"][-1]),
    )
