"""Expected durations of runs: from their own speed once they train, before that from finished runs
with the same model, method and data.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from training.gpus.ledger import get_seconds_by_run
from training.runs.models import Run
from training.runs.states import ACTIVE, State

MAX_SAMPLE_RUNS = 200  # the runs that finished last
RunKind = tuple[int, str, int]  # base model, method, dataset version


class TypicalDuration(NamedTuple):
    """Median device-seconds of finished runs of a kind."""

    seconds_per_step: float
    total_seconds: float


def get_typical_durations() -> dict[RunKind, TypicalDuration]:
    """The typical duration of each kind of run. Time in the queue or paused does not count."""
    rows = Run.objects.filter(state=State.FINISHED, total_steps__gt=0).order_by("-finished_at")
    finished = {
        pk: (kind, steps)
        for pk, *kind, steps in rows.values_list(
            "pk", "base_model", "method", "data", "total_steps"
        )[:MAX_SAMPLE_RUNS]
    }
    samples: dict[RunKind, list[tuple[float, float]]] = defaultdict(list)
    for run, used in get_seconds_by_run(finished).items():
        (model, method, data), steps = finished[run]
        samples[model, method, data].append((used / steps, used))
    return {
        kind: TypicalDuration(*(statistics.median(column) for column in zip(*pairs, strict=True)))
        for kind, pairs in samples.items()
    }


def estimate_remaining_seconds(
    run: Run, typical_durations: dict[RunKind, TypicalDuration]
) -> float:
    """Seconds that a run still needs, or infinity if there is nothing to estimate from."""
    steps_left = max(0, run.total_steps - run.step)
    if run.seconds_per_step and run.total_steps:
        return run.seconds_per_step * steps_left
    typical = typical_durations.get((run.base_model_id, run.method, run.data_id))
    if typical is None:
        return math.inf
    return typical.seconds_per_step * steps_left if run.total_steps else typical.total_seconds


def estimate_ends(
    runs: Iterable[Run], typical_durations: dict[RunKind, TypicalDuration], now: datetime
) -> dict[int, float]:
    """Expected ends of the running runs, in seconds since 1970."""
    return {
        run.pk: now.timestamp() + estimate_remaining_seconds(run, typical_durations)
        for run in runs
        if run.state in ACTIVE
    }
