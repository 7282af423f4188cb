"""How long runs should take: by their own pace once they train, before that by what runs of the
same kind took.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from training.gpus.ledger import used_by_runs
from training.runs.models import Run
from training.runs.states import ACTIVE, State

LEARNED_FROM = 200  # runs that finished last
Kind = tuple[int, str, int]  # base model, method, data version


class Usual(NamedTuple):
    """What finished runs of a kind took of devices, in seconds: for each step, and in all."""

    a_step: float
    whole: float


def usual_times() -> dict[Kind, Usual]:
    """The medians of finished runs, by model, method and data. What they waited, or were paused, is
    not in them.
    """
    rows = Run.objects.filter(state=State.FINISHED, total_steps__gt=0).order_by("-finished_at")
    done = {
        pk: (kind, steps)
        for pk, *kind, steps in rows.values_list(
            "pk", "base_model", "method", "data", "total_steps"
        )[:LEARNED_FROM]
    }
    found: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
    for run, used in used_by_runs(done).items():
        (model, method, data), steps = done[run]
        found[model, method, data].append((used / steps, used))
    return {
        kind: Usual(*(statistics.median(column) for column in zip(*taken, strict=True)))
        for kind, taken in found.items()
    }


def expected_seconds(run: Run, kinds: dict[Kind, Usual]) -> float:
    """Seconds that a run still needs; infinity where nobody knows."""
    left = max(0, run.total_steps - run.step)
    if run.seconds_per_step and run.total_steps:
        return run.seconds_per_step * left
    usual = kinds.get((run.base_model_id, run.method, run.data_id))
    if usual is None:
        return math.inf
    return usual.a_step * left if run.total_steps else usual.whole


def expected_ends(runs: Iterable[Run], kinds: dict[Kind, Usual], now: datetime) -> dict[int, float]:
    """In seconds since 1970, of runs that hold a device."""
    return {
        run.pk: now.timestamp() + expected_seconds(run, kinds)
        for run in runs
        if run.state in ACTIVE
    }
