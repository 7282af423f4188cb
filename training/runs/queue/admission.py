"""The queue: one admission pass in one writer's transaction, and what each waiting run is told of
its place, reason and time.

It reads runs into the scheduler's scene (training/gpus) and writes its decisions down; the policy
itself is not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import allocations, audit
from training.gpus.devices import GONE_AFTER
from training.gpus.ledger import used_by_run
from training.gpus.models import Allocation, Device, Pool, Quota
from training.gpus.scheduling.load_state import scene_of
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import NOBODY, Decision, Request, Scene
from training.runs.forecast.target_device import get_default_pool
from training.runs.models import Run
from training.runs.queue import durations
from training.runs.signals import run_queued
from training.runs.states import ACTIVE, UNFINISHED, State, RequestedAction


def is_anything_to_do() -> bool:
    """Is there a run that has not ended, or a device that one holds or has kept for it?"""
    return (
        Run.objects.filter(state__in=UNFINISHED).exists()
        or Allocation.objects.filter(released_at=None).exists()
        or Device.objects.exclude(kept_for=None).exists()
    )


def admit() -> list[int]:
    """One pass over every pool; the runs that got a device. Whoever calls rings their workers after
    the commit.
    """
    with transaction.atomic():
        audit.one_at_a_time("admission")
        give_up_lost()
        now = timezone.now()
        end_overdue(now)
        Run.objects.filter(state=State.QUEUED, pool=None).update(pool=get_default_pool())
        allocations.forget_kept(
            dict(Run.objects.filter(state=State.QUEUED).values_list("pk", "pool"))
        )
        kinds = durations.usual_times()
        return [run_id for pool in Pool.objects.all() for run_id in admit_in(pool, now, kinds)]


def admit_in(pool: Pool, now: datetime, kinds: dict[durations.Kind, durations.Usual]) -> list[int]:
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
        holder = allocations.Holder(
            run.pk, run.name, run.owner, run.team, run.priority, held.memory
        )
        allocations.reserve(devices[held.card], holder)
        given = {"given": str(devices[held.card]), "at": timezone.now().timestamp()}
        Run.objects.filter(pk=run.pk).update(queue_info=given, revision=F("revision") + 1)
    Device.objects.filter(kept_for__in=made.given_up).update(kept_for=None)
    for victim, preemptor in made.evictions.items():
        allocations.evict(victim, keep_for=preemptor, reason=f"makes room for run {preemptor}")


def look_once(*, but: int = 0) -> None:
    """A pass, now: whoever gets a device is rung, except the one that the caller takes up
    itself.
    """
    for run_id in admit():
        if run_id != but:
            run_queued.send(Run, run_id=run_id)


def waiting_runs(pool: Pool) -> list[Run]:
    """Runs that wait for a device of this pool. One that was given a device and waits for its
    worker is not among them.
    """
    given = Allocation.objects.filter(released_at=None).values("run_id")
    rows = Run.objects.filter(pool=pool, state=State.QUEUED, lease_token="").exclude(pk__in=given)
    return list(
        rows.select_related("owner", "team").defer("config", "start_info", "auto_plan", "sparkline", "notes")
    )


def picture(
    pool: Pool, waiting: Iterable[Run], now: datetime, kinds: dict[durations.Kind, durations.Usual]
) -> Scene:
    running = Run.objects.filter(pool=pool, state__in=ACTIVE).defer(
        "config", "start_info", "auto_plan", "sparkline"
    )
    requests = [request_of(run, now, kinds) for run in waiting]
    return scene_of(pool, now, requests, durations.expected_ends(running, kinds, now))


def request_of(run: Run, now: datetime, kinds: dict[durations.Kind, durations.Usual]) -> Request:
    return Request(
        run=run.pk,
        team=run.team_id or NOBODY,
        user=run.owner_id,
        submitted=run.queued_at.timestamp(),
        memory=run.forecast.get("peak"),
        priority=run.priority,
        seconds=durations.expected_seconds(run, kinds),
        moved_up=run.moved_up_at.timestamp() if run.moved_up_at else 0.0,
        due=run.not_before is None or run.not_before <= now,
    )


def give_up_lost() -> None:
    """Runs on a host that is gone wait again: their engines have left by themselves, the leash is
    shorter than the lease.
    """
    gone = Q(device__host__reported_at__lt=Now() - GONE_AFTER)
    held = Allocation.objects.filter(gone, released_at=None).values_list(
        "run_id", "device__host__name"
    )
    for run_id, host in list(held):
        lost = Run.objects.filter(pk=run_id).filter(
            Q(state__in=ACTIVE, lease_expires_at__lt=Now()) | Q(state=State.QUEUED)
        )
        changed = lost.update(
            state=State.QUEUED,
            lease_token="",
            lease_owner="",
            lease_expires_at=None,
            phase="",
            queue_info={},
            message=f"Its host {host} is gone; goes on from its last checkpoint elsewhere.",
            revision=F("revision") + 1,
        )
        if changed:
            allocations.release(run_id)
    over = Allocation.objects.filter(released_at=None).exclude(
        run_id__in=Run.objects.filter(state__in=UNFINISHED).values("pk")
    )
    for run_id in over.values_list("run_id", flat=True):
        allocations.release(run_id)  # whoever ended it died before it gave the device back


def end_overdue(now: datetime) -> None:
    """Runs that have held devices longer than their team may are told to save and end."""
    for quota in Quota.objects.exclude(longest_seconds=None):
        held = Allocation.objects.filter(
            device__pool=quota.pool_id, team=quota.team_id, released_at=None
        )
        for run_id in list(held.values_list("run_id", flat=True)):
            too_long = used_by_run(run_id, now) - float(quota.longest_seconds or 0)
            overdue = Run.objects.filter(
                pk=run_id, state__in=(State.STARTING, State.RUNNING), forgiven_seconds__lte=too_long
            )
            if overdue.update(state=State.STOPPING, requested_action=RequestedAction.TIME_LIMIT, revision=F("revision") + 1):
                most = {"longest_seconds": quota.longest_seconds}
                audit.note(
                    None, "time used up", f"run {run_id}", team=quota.team, change=({}, most)
                )


def longest_of(run: Run) -> timedelta | None:
    """How long a run may hold devices, over all attempts."""
    quota = (
        Quota.objects.filter(pool=run.pool_id, team=run.team_id)
        .exclude(longest_seconds=None)
        .first()
    )
    return timedelta(seconds=quota.longest_seconds) if quota and quota.longest_seconds else None
