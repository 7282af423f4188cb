"""What each waiting run is told: its place, why it waits, what would help, and when it should
start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db.models import F
from django.utils import timezone

from training.gpus.models import Pool
from training.gpus.scheduling.eta import Range, ranges
from training.gpus.scheduling.explain import barriers, sooner, words
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import Scene
from training.runs.models import Run
from training.runs.queue import durations
from training.runs.queue.admission import look_once, picture, waiting_runs
from training.runs.states import State

CLOCK_SHARE = 20


# a waiting run's words are written again at least that often, so that their age shows a dead worker
FRESH_SECONDS = 10


class Clock:
    """When waiting runs should start, told again when that is due: it takes at most a twentieth of
    this thread's time.

    Ten thousand of them take 20 s (benchmarks/scheduler.py); a usual queue takes a millisecond and
    is told every time.
    """

    def __init__(self) -> None:
        self.known: dict[str, tuple[float, dict[int, Range]]] = {}

    def ranges(self, scene: Scene) -> dict[int, Range]:
        began = time.monotonic()
        due, told = self.known.get(scene.pool, (0.0, {}))
        if began >= due:
            told = ranges(scene, scene.now)
            self.known[scene.pool] = (began + CLOCK_SHARE * (time.monotonic() - began), told)
        return told


clock = Clock()


def look() -> None:
    """A pass, and every waiting run's words brought up to date."""
    look_once()
    now, kinds = timezone.now(), durations.usual_times()
    for pool in Pool.objects.all():
        waiting = waiting_runs(pool)
        if waiting:
            tell(waiting, picture(pool, waiting, now, kinds), now)


def tell(waiting: Iterable[Run], scene: Scene, now: datetime) -> None:
    """Write place, reason, what would help, and the range in which it should start. Nothing is
    admitted here.
    """
    scheduler = Scheduler(scene)
    told = barriers(scheduler, scheduler.admit(now.timestamp()).barriers)
    times = clock.ranges(scene)
    requests = {request.run: request for request in scene.waiting}
    for run in waiting:
        if run.pk not in told:
            continue  # it gets a device with the next pass
        place, barrier = told[run.pk]
        when = times.get(run.pk)
        said: dict[str, Any] = {
            "place": place,
            "of": len(told),
            "why": barrier.why,
            "reason": words(barrier, scene),
            "sooner": sooner(scheduler, requests[run.pk], barrier),
            "earliest": when and when.earliest,
            "latest": when.latest if when and when.latest < math.inf else None,
        }
        write(run, said, now)


def write(run: Run, said: dict[str, Any], now: datetime) -> None:
    """The row moves (and browsers with it) only if something is new; times that slip by a second
    are not.
    """
    old = {name: value for name, value in run.queue_info.items() if name != "at"}
    rounded = [
        {**one, **{k: one.get(k) and round(one[k] / 60) for k in ("earliest", "latest")}}
        for one in (old, said)
    ]
    age = now.timestamp() - run.queue_info.get("at", 0)
    if rounded[0] == rounded[1] and age < FRESH_SECONDS:
        return
    moved = {"revision": F("revision") + 1} if rounded[0] != rounded[1] else {}
    Run.objects.filter(pk=run.pk, state=State.QUEUED).update(
        queue_info={**said, "at": now.timestamp()}, **moved
    )
