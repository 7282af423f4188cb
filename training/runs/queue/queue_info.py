"""What a waiting run shows: its position, why it waits, a hint, and when it should start."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db.models import F
from django.utils import timezone

from training.gpus.models import Pool
from training.gpus.scheduling.eta import StartRange, estimate_start_ranges
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import PoolState
from training.gpus.scheduling.wait_messages import explain_queue, format_block_reason, get_hint
from training.runs.models import Run
from training.runs.queue import durations
from training.runs.queue.admission import build_pool_state, get_waiting_runs, run_admission_pass
from training.runs.states import State

# The next estimate of start times is due after this many times the duration of the last one
ETA_INTERVAL_FACTOR = 20
# The reason of a waiting run is rewritten at least this often. A dead worker shows by its age.
REFRESH_SECONDS = 10


class EtaThrottle:
    """Caches the estimated start times so that they take at most a twentieth of a worker's time.

    An estimate for ten thousand waiting runs takes 20 s (benchmarks/scheduler.py). One for a
    typical queue takes a millisecond and is made every time.

    Each worker process has one instance, used by the thread that refreshes the queue.
    """

    def __init__(self) -> None:
        self.cached_ranges: dict[str, tuple[float, dict[int, StartRange]]] = {}

    def get_ranges(self, pool_state: PoolState) -> dict[int, StartRange]:
        started_at = time.monotonic()
        due_at, start_ranges = self.cached_ranges.get(pool_state.pool, (0.0, {}))
        if started_at >= due_at:
            start_ranges = estimate_start_ranges(pool_state, pool_state.now)
            self.cached_ranges[pool_state.pool] = (
                started_at + ETA_INTERVAL_FACTOR * (time.monotonic() - started_at),
                start_ranges,
            )
        return start_ranges


eta_throttle = EtaThrottle()


def refresh_queue() -> None:
    """Run an admission pass, then update what every waiting run shows."""
    run_admission_pass()
    now, typical_durations = timezone.now(), durations.get_typical_durations()
    for pool in Pool.objects.all():
        waiting = get_waiting_runs(pool)
        if waiting:
            update_wait_reasons(
                waiting, build_pool_state(pool, waiting, now, typical_durations), now
            )


def update_wait_reasons(waiting: Iterable[Run], pool_state: PoolState, now: datetime) -> None:
    """Store position, reason, hint and estimated start of every waiting run. Admits nothing."""
    scheduler = Scheduler(pool_state)
    explained = explain_queue(scheduler, scheduler.admit_runs(now.timestamp()).block_reasons)
    start_ranges = eta_throttle.get_ranges(pool_state)
    waiting_runs = {waiting_run.run: waiting_run for waiting_run in pool_state.waiting}
    for run in waiting:
        if run.pk not in explained:
            continue  # it gets a device in the next pass
        position, block = explained[run.pk]
        start_range = start_ranges.get(run.pk)
        queue_info: dict[str, Any] = {
            "position": position,
            "total": len(explained),
            "code": block.code,
            "reason": format_block_reason(block, pool_state),
            "hint": get_hint(scheduler, waiting_runs[run.pk], block),
            "earliest": start_range and start_range.earliest,
            "latest": start_range.latest if start_range and start_range.latest < math.inf else None,
        }
        save_wait_reason(run, queue_info, now)


def save_wait_reason(run: Run, queue_info: dict[str, Any], now: datetime) -> None:
    """Store the reason. The revision changes, and with it the open pages, only if something is new.

    Start times that differ by less than a minute are not new.
    """
    old_info = {name: value for name, value in run.queue_info.items() if name != "at"}
    rounded = [
        {**one, **{k: one.get(k) and round(one[k] / 60) for k in ("earliest", "latest")}}
        for one in (old_info, queue_info)
    ]
    age = now.timestamp() - run.queue_info.get("at", 0)
    if rounded[0] == rounded[1] and age < REFRESH_SECONDS:
        return
    revision_update = {"revision": F("revision") + 1} if rounded[0] != rounded[1] else {}
    Run.objects.filter(pk=run.pk, state=State.QUEUED).update(
        queue_info={**queue_info, "at": now.timestamp()}, **revision_update
    )
