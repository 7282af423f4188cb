"""Estimate when waiting runs start: run the scheduler on a copy of the pool's state and advance the
clock from one expected end to the next.

The estimate assumes that no new runs arrive and that no run is evicted. A run within its team's
guarantee may therefore start earlier.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import EVICTION_GRACE_SECONDS, PoolState, RunningRun

# Runs behind the head that are examined at each end: ten times fewer than in a real pass, because
# one estimate can take ten thousand passes
BACKFILL_DEPTH = 20
SLACK_FACTOR = 1.5  # the late estimate assumes that everything takes 50% longer than expected


@dataclass(frozen=True)
class StartRange:
    """Seconds on the pool's clock. `latest` is infinite if a run ahead has no expected end."""

    earliest: float
    latest: float


def estimate_start_times(
    pool_state: PoolState, now: float, *, slack: float = 1.0, evict: bool = False
) -> dict[int, float]:
    """When each waiting run starts if every duration is `slack` times the expected one. Runs that
    would never start are left out.

    With `evict`, runs may be evicted. The result does not say when those start again.
    """
    scheduler = Scheduler(apply_slack(pool_state, now, slack))
    ends = [
        (running.expected_end, running.run)
        for running in scheduler.running.values()
        if running.expected_end < math.inf
    ]
    heapq.heapify(ends)
    starts_at: dict[int, float] = {}
    clock = now
    while True:
        # Admit at this moment, then queue the ends of the runs that started or leave
        decision = scheduler.admit_runs(clock, evict=evict, depth=BACKFILL_DEPTH)
        for run in decision.evictions:
            heapq.heappush(ends, (clock + EVICTION_GRACE_SECONDS, run))
        for running in decision.starts:
            starts_at[running.run] = clock
            if running.expected_end < math.inf:
                heapq.heappush(ends, (running.expected_end, running.run))
        if not ends:
            return starts_at
        # Advance to the next end and release every run that ends by then
        clock = max(clock, ends[0][0])
        while ends and ends[0][0] <= clock:
            run = heapq.heappop(ends)[1]
            if run in scheduler.running:  # an evicted run has a second, later end
                scheduler.release_run(run)


def estimate_start_ranges(pool_state: PoolState, now: float) -> dict[int, StartRange]:
    """The range in which each waiting run should start. A run that nothing would let start is left
    out.
    """
    earliest, latest = (
        estimate_start_times(pool_state, now),
        estimate_start_times(pool_state, now, slack=SLACK_FACTOR),
    )
    return {run: StartRange(at, max(at, latest.get(run, math.inf))) for run, at in earliest.items()}


def apply_slack(pool_state: PoolState, now: float, slack: float) -> PoolState:
    """A copy in which every remaining duration is `slack` times as long."""

    def delay_end(running: RunningRun) -> RunningRun:
        return replace(running, expected_end=now + max(0.0, running.expected_end - now) * slack)

    waiting = [
        replace(waiting_run, is_retry_due=True, seconds=waiting_run.seconds * slack)
        for waiting_run in pool_state.waiting
    ]
    return replace(
        pool_state,
        running=[delay_end(running) for running in pool_state.running],
        waiting=waiting,
    )


def compare_start_times(
    before: PoolState, after: PoolState, now: float
) -> Mapping[int, tuple[float, float]]:
    """Waiting runs whose start an edit would change: the times before and after it, infinity for
    never. Evictions are simulated in both.
    """
    starts_before, starts_after = (
        estimate_start_times(pool_state, now, evict=True) for pool_state in (before, after)
    )
    shifts = {}
    for waiting_run in before.waiting:
        start_before, start_after = (
            starts_before.get(waiting_run.run, math.inf),
            starts_after.get(waiting_run.run, math.inf),
        )
        if start_before != start_after:
            shifts[waiting_run.run] = (start_before, start_after)
    return shifts
