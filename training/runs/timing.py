"""How long runs should take: by their own pace once they train, before that by what runs of the same kind took."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

from training.runs.models import Run
from training.runs.states import ACTIVE, State

LEARNED_FROM = 200  # runs that finished last
Kind = tuple[int, str, int]  # base model, method, data version


def seconds_of_kinds() -> dict[Kind, float]:
    """The median time from start to end of finished runs, by model, method and data."""
    done = Run.objects.filter(state=State.FINISHED, started_at__isnull=False).order_by("-finished_at")
    rows = done.values_list("base_model", "method", "data", "started_at", "finished_at")[:LEARNED_FROM]
    found = defaultdict(list)
    for model, method, data, started, finished in rows:
        found[model, method, data].append((finished - started).total_seconds())
    return {kind: statistics.median(taken) for kind, taken in found.items()}


def expected_seconds(run: Run, kinds: dict[Kind, float]) -> float:
    """Seconds that a run still needs; infinity where nobody knows."""
    if run.seconds_per_step and run.total_steps:
        return run.seconds_per_step * max(0, run.total_steps - run.step)
    return kinds.get((run.base_model_id, run.method, run.data_id), math.inf)


def expected_ends(runs: Iterable[Run], kinds: dict[Kind, float], now: datetime) -> dict[int, float]:
    """In seconds since 1970, of runs that hold a device."""
    return {run.pk: now.timestamp() + expected_seconds(run, kinds) for run in runs if run.state in ACTIVE}
