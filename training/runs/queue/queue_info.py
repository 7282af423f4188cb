"""What a waiting run shows: its position, why it waits, a hint, and when it should start."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from django.db.models import F
from django.utils import timezone

from training.gpus.models import Allocation, Pool
from training.gpus.scheduling.eta import StartRange, estimate_start_ranges
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import PoolState
from training.gpus.scheduling.wait_messages import explain_queue, format_block_reason, get_hint
from training.runs.models import Run
from training.runs.queue import durations
from training.runs.queue.admission import build_pool_state, get_waiting_runs, run_admission_pass
from training.runs.queue.write_throttle import WriteThrottle
from training.runs.states import State

# The next estimate of start times is due after this many times the duration of the last one
ETA_INTERVAL_FACTOR = 20
# The reason of a waiting run is confirmed at least this often. A dead worker shows by its age.
REFRESH_INTERVAL = timedelta(seconds=10)
BATCH_RUNS = 200
Item = TypeVar("Item")


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
queue_info_throttle = WriteThrottle()


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
    changed, unchanged = [], []
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
        if round_start_times(queue_info) != round_start_times(run.queue_info):
            run.queue_info, run.queue_info_at = queue_info, now
            changed.append(run)
        elif run.queue_info_at is None or now - run.queue_info_at > REFRESH_INTERVAL:
            unchanged.append(run.pk)
    save_wait_reasons(changed, unchanged, now)


def round_start_times(queue_info: dict[str, Any]) -> dict[str, Any]:
    """The information without what is not new: start times that differ by less than a minute."""
    times = {name: queue_info.get(name) for name in ("earliest", "latest")}
    return queue_info | {name: value and round(value / 60) for name, value in times.items()}


def save_wait_reasons(changed: Sequence[Run], unchanged: Sequence[int], now: datetime) -> None:
    """Store what is new, and when the rest was found to be still true. The revision changes, and
    with it the open pages, only if something is new. In batches, since another process may wait for
    SQLite's lock: one statement for each of 10,000 runs kept a launch waiting for 15 s.
    """
    # Not of a run that has got a device or a worker meanwhile
    allocated_runs = Allocation.objects.filter(released_at=None).values("run_id")
    queued = Run.objects.filter(state=State.QUEUED, lease_token="").exclude(pk__in=allocated_runs)
    for batch in batched(changed, BATCH_RUNS):
        with queue_info_throttle.atomic():
            queued.bulk_update(batch, ["queue_info", "queue_info_at"])
            queued.filter(pk__in=[run.pk for run in batch]).update(revision=F("revision") + 1)
    for pks in batched(unchanged, BATCH_RUNS):
        with queue_info_throttle.atomic():
            queued.filter(pk__in=pks).update(queue_info_at=now)


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
