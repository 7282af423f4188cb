"""When waiting runs should start: the scheduler itself on a copy of the scene, from one expected
end to the next.

It supposes that nobody new comes and nobody is stopped for others: a run inside its team's
guarantee may start sooner.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import EVICTION_GRACE_SECONDS, PoolState, RunningJob

# runs behind the head that are tried at each end: ten times fewer than in a true pass, for ten
# thousand passes
BACKFILL_DEPTH = 20
SLACK_FACTOR = 1.5  # the later end of the range: everything takes half as long again as expected


@dataclass(frozen=True)
class StartRange:
    """Seconds on the scene's clock. `latest` is infinite where something ahead has no expected
    end.
    """

    earliest: float
    latest: float


def estimate_start_times(
    pool_state: PoolState, now: float, *, slack: float = 1.0, evict: bool = False
) -> dict[int, float]:
    """When each waiting run starts if all that runs takes `slack` times what is expected. Runs that
    never would are left out.

    With `evict`, runs that must make room leave; when those start again is not told.
    """
    scheduler = Scheduler(apply_slack(pool_state, now, slack))
    ends = [
        (job.expected_end, job.run)
        for job in scheduler.running_jobs.values()
        if job.expected_end < math.inf
    ]
    heapq.heapify(ends)
    starts_at: dict[int, float] = {}
    clock = now
    while True:
        decision = scheduler.admit_jobs(clock, evict=evict, depth=BACKFILL_DEPTH)
        for run in decision.evictions:
            heapq.heappush(ends, (clock + EVICTION_GRACE_SECONDS, run))
        for job in decision.starts:
            starts_at[job.run] = clock
            if job.expected_end < math.inf:
                heapq.heappush(ends, (job.expected_end, job.run))
        if not ends:
            return starts_at
        clock = max(clock, ends[0][0])
        while ends and ends[0][0] <= clock:
            run = heapq.heappop(ends)[1]
            if run in scheduler.running_jobs:  # else it was told to leave, and has
                scheduler.release_job(run)


def estimate_start_ranges(pool_state: PoolState, now: float) -> dict[int, StartRange]:
    """The range in which each waiting run should start; absent: nothing that runs now would let it
    start.
    """
    earliest, latest = (
        estimate_start_times(pool_state, now),
        estimate_start_times(pool_state, now, slack=SLACK_FACTOR),
    )
    return {run: StartRange(at, max(at, latest.get(run, math.inf))) for run, at in earliest.items()}


def apply_slack(pool_state: PoolState, now: float, slack: float) -> PoolState:
    def delay_end(job: RunningJob) -> RunningJob:
        return replace(job, expected_end=now + max(0.0, job.expected_end - now) * slack)

    waiting = [
        replace(pending, is_due=True, seconds=pending.seconds * slack)
        for pending in pool_state.waiting
    ]
    return replace(
        pool_state,
        running_jobs=[delay_end(job) for job in pool_state.running_jobs],
        waiting=waiting,
    )


def dry_run(before: PoolState, after: PoolState, now: float) -> Mapping[int, tuple[float, float]]:
    """Waiting runs whose start an edit would move: the times before and after, infinity for never.
    Runs make room in both.
    """
    starts_before, starts_after = (
        estimate_start_times(pool_state, now, evict=True) for pool_state in (before, after)
    )
    shifts = {}
    for pending in before.waiting:
        start_before, start_after = (
            starts_before.get(pending.run, math.inf),
            starts_after.get(pending.run, math.inf),
        )
        if start_before != start_after:
            shifts[pending.run] = (start_before, start_after)
    return shifts
