"""The queue: one admission pass in one writer's transaction, and what each waiting run is told of its place, reason and time.

It reads runs into the scheduler's scene (training/gpus) and writes its decisions down; the policy itself is not here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import allocations, audit
from training.gpus.devices import GONE_AFTER
from training.gpus.ledger import used_by_run
from training.gpus.models import Allocation, Device, Pool, Quota
from training.gpus.scheduling.eta import Range, ranges
from training.gpus.scheduling.explain import barriers, sooner, words
from training.gpus.scheduling.load_state import scene_of
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import NOBODY, Decision, Request, Scene
from training.runs import timing
from training.runs.models import Run
from training.runs.signals import run_queued
from training.runs.states import ACTIVE, OPEN, State, Wish
from training.runs.target import default_pool

CLOCK_SHARE = 20
FRESH_SECONDS = 10  # a waiting run's words are written again at least that often, so that their age shows a dead worker


def admit() -> list[int]:
    """One pass over every pool; the runs that got a device. Whoever calls rings their workers after the commit."""
    with transaction.atomic():
        audit.one_at_a_time("admission")
        give_up_lost()
        now = timezone.now()
        end_overdue(now)
        Run.objects.filter(state=State.QUEUED, pool=None).update(pool=default_pool())
        allocations.forget_kept(dict(Run.objects.filter(state=State.QUEUED).values_list("pk", "pool")))
        kinds = timing.usual_times()
        return [run_id for pool in Pool.objects.all() for run_id in admit_in(pool, now, kinds)]


def admit_in(pool: Pool, now: datetime, kinds: dict[timing.Kind, timing.Usual]) -> list[int]:
    waiting = waiting_runs(pool)
    if not waiting:
        return []
    made = Scheduler(picture(pool, waiting, now, kinds)).admit(now.timestamp())
    apply(made, {run.pk: run for run in waiting})
    return [held.run for held in made.starts]


def apply(made: Decision, runs: dict[int, Run]) -> None:
    devices = Device.objects.select_related("host").in_bulk([held.card for held in made.starts])
    for held in made.starts:
        run = runs[held.run]
        holder = allocations.Holder(run.pk, run.name, run.owner, run.team, run.priority, held.memory)
        allocations.reserve(devices[held.card], holder)
        given = {"given": str(devices[held.card]), "at": timezone.now().timestamp()}
        Run.objects.filter(pk=run.pk).update(waits=given, revision=F("revision") + 1)
    Device.objects.filter(kept_for__in=made.given_up).update(kept_for=None)
    for victim, preemptor in made.evictions.items():
        allocations.evict(victim, keep_for=preemptor, reason=f"makes room for run {preemptor}")


class Clock:
    """When waiting runs should start, told again when that is due: it takes at most a twentieth of this thread's time.

    Ten thousand of them take 20 s (benchmarks/scheduler.py); a usual queue takes a millisecond and is told every time.
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


def look_once(*, but: int = 0) -> None:
    """A pass, now: whoever gets a device is rung, except the one that the caller takes up itself."""
    for run_id in admit():
        if run_id != but:
            run_queued.send(Run, run_id=run_id)


def look() -> None:
    """A pass, and every waiting run's words brought up to date."""
    look_once()
    now, kinds = timezone.now(), timing.usual_times()
    for pool in Pool.objects.all():
        waiting = waiting_runs(pool)
        if waiting:
            tell(waiting, picture(pool, waiting, now, kinds), now)


def tell(waiting: Iterable[Run], scene: Scene, now: datetime) -> None:
    """Write place, reason, what would help, and the range in which it should start. Nothing is admitted here."""
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
    """The row moves (and browsers with it) only if something is new; times that slip by a second are not."""
    old = {name: value for name, value in run.waits.items() if name != "at"}
    rounded = [{**one, **{k: one.get(k) and round(one[k] / 60) for k in ("earliest", "latest")}} for one in (old, said)]
    age = now.timestamp() - run.waits.get("at", 0)
    if rounded[0] == rounded[1] and age < FRESH_SECONDS:
        return
    moved = {"revision": F("revision") + 1} if rounded[0] != rounded[1] else {}
    Run.objects.filter(pk=run.pk, state=State.QUEUED).update(waits={**said, "at": now.timestamp()}, **moved)


def waiting_runs(pool: Pool) -> list[Run]:
    """Runs that wait for a device of this pool. One that was given a device and waits for its worker is not among them."""
    given = Allocation.objects.filter(released_at=None).values("run_id")
    rows = Run.objects.filter(pool=pool, state=State.QUEUED, lease_token="").exclude(pk__in=given)
    return list(rows.select_related("owner", "team").defer("config", "plan", "advice", "sparkline", "notes"))


def picture(pool: Pool, waiting: Iterable[Run], now: datetime, kinds: dict[timing.Kind, timing.Usual]) -> Scene:
    running = Run.objects.filter(pool=pool, state__in=ACTIVE).defer("config", "plan", "advice", "sparkline")
    requests = [request_of(run, now, kinds) for run in waiting]
    return scene_of(pool, now, requests, timing.expected_ends(running, kinds, now))


def request_of(run: Run, now: datetime, kinds: dict[timing.Kind, timing.Usual]) -> Request:
    return Request(
        run=run.pk,
        team=run.team_id or NOBODY,
        user=run.owner_id,
        submitted=run.queued_at.timestamp(),
        memory=run.forecast.get("peak"),
        priority=run.priority,
        seconds=timing.expected_seconds(run, kinds),
        moved_up=run.moved_up_at.timestamp() if run.moved_up_at else 0.0,
        due=run.not_before is None or run.not_before <= now,
    )


def give_up_lost() -> None:
    """Runs on a host that is gone wait again: their engines have left by themselves, the leash is shorter than the lease."""
    gone = Q(device__host__reported_at__lt=Now() - GONE_AFTER)
    held = Allocation.objects.filter(gone, released_at=None).values_list("run_id", "device__host__name")
    for run_id, host in list(held):
        lost = Run.objects.filter(pk=run_id).filter(Q(state__in=ACTIVE, lease_expires_at__lt=Now()) | Q(state=State.QUEUED))
        changed = lost.update(
            state=State.QUEUED,
            lease_token="",
            lease_owner="",
            lease_expires_at=None,
            phase="",
            waits={},
            message=f"Its host {host} is gone; goes on from its last checkpoint elsewhere.",
            revision=F("revision") + 1,
        )
        if changed:
            allocations.release(run_id)
    over = Allocation.objects.filter(released_at=None).exclude(run_id__in=Run.objects.filter(state__in=OPEN).values("pk"))
    for run_id in over.values_list("run_id", flat=True):
        allocations.release(run_id)  # whoever ended it died before it gave the device back


def end_overdue(now: datetime) -> None:
    """Runs that have held devices longer than their team may are told to save and end."""
    for quota in Quota.objects.exclude(longest_seconds=None):
        held = Allocation.objects.filter(device__pool=quota.pool_id, team=quota.team_id, released_at=None)
        for run_id in list(held.values_list("run_id", flat=True)):
            too_long = used_by_run(run_id, now) - float(quota.longest_seconds or 0)
            overdue = Run.objects.filter(pk=run_id, state__in=(State.STARTING, State.RUNNING), forgiven_seconds__lte=too_long)
            if overdue.update(state=State.STOPPING, wish=Wish.TIME, revision=F("revision") + 1):
                most = {"longest_seconds": quota.longest_seconds}
                audit.note(None, "time used up", f"run {run_id}", team=quota.team, change=({}, most))


def longest_of(run: Run) -> timedelta | None:
    """How long a run may hold devices, over all attempts."""
    quota = Quota.objects.filter(pool=run.pool_id, team=run.team_id).exclude(longest_seconds=None).first()
    return timedelta(seconds=quota.longest_seconds) if quota and quota.longest_seconds else None
