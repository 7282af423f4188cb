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
from training.gpus.scheduling.state import LEAVING_SECONDS, Holding, Scene

# runs behind the head that are tried at each end: ten times fewer than in a true pass, for ten
# thousand passes
DEPTH = 20
SLACK = 1.5  # the later end of the range: everything takes half as long again as expected


@dataclass(frozen=True)
class Range:
    """Seconds on the scene's clock. `latest` is infinite where something ahead has no expected
    end.
    """

    earliest: float
    latest: float


def start_times(
    scene: Scene, now: float, *, slack: float = 1.0, evict: bool = False
) -> dict[int, float]:
    """When each waiting run starts if all that runs takes `slack` times what is expected. Runs that
    never would are left out.

    With `evict`, runs that must make room leave; when those start again is not told.
    """
    scheduler = Scheduler(slowed(scene, now, slack))
    ends = [(held.ends, held.run) for held in scheduler.where.values() if held.ends < math.inf]
    heapq.heapify(ends)
    found: dict[int, float] = {}
    at = now
    while True:
        made = scheduler.admit(at, evict=evict, depth=DEPTH)
        for run in made.evictions:
            heapq.heappush(ends, (at + LEAVING_SECONDS, run))
        for held in made.starts:
            found[held.run] = at
            if held.ends < math.inf:
                heapq.heappush(ends, (held.ends, held.run))
        if not ends:
            return found
        at = max(at, ends[0][0])
        while ends and ends[0][0] <= at:
            run = heapq.heappop(ends)[1]
            if run in scheduler.where:  # else it was told to leave, and has
                scheduler.release(run)


def ranges(scene: Scene, now: float) -> dict[int, Range]:
    """The range in which each waiting run should start; absent: nothing that runs now would let it
    start.
    """
    early, late = start_times(scene, now), start_times(scene, now, slack=SLACK)
    return {run: Range(at, max(at, late.get(run, math.inf))) for run, at in early.items()}


def slowed(scene: Scene, now: float, slack: float) -> Scene:
    def later(held: Holding) -> Holding:
        return replace(held, ends=now + max(0.0, held.ends - now) * slack)

    waiting = [
        replace(request, due=True, seconds=request.seconds * slack) for request in scene.waiting
    ]
    return replace(scene, holdings=[later(held) for held in scene.holdings], waiting=waiting)


def dry_run(before: Scene, after: Scene, now: float) -> Mapping[int, tuple[float, float]]:
    """Waiting runs whose start an edit would move: the times before and after, infinity for never.
    Runs make room in both.
    """
    old, new = (start_times(scene, now, evict=True) for scene in (before, after))
    moved = {}
    for request in before.waiting:
        was, will = old.get(request.run, math.inf), new.get(request.run, math.inf)
        if was != will:
            moved[request.run] = (was, will)
    return moved
