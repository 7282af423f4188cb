"""Admission: load the waiting runs into the scheduler (training/gpus/scheduling), run one pass, and
store its decisions. The policy itself is in the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import allocations, audit
from training.gpus.devices import HOST_TIMEOUT
from training.gpus.ledger import get_run_seconds
from training.gpus.models import Allocation, Device, Pool, Quota
from training.gpus.scheduling.load_state import load_pool_state
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import NO_TEAM, Decision, PoolState, WaitingRun
from training.runs.forecast.target_device import get_default_pool
from training.runs.models import Run
from training.runs.queue import durations
from training.runs.queue.write_throttle import WriteThrottle
from training.runs.signals import run_queued
from training.runs.states import ACTIVE, UNFINISHED, RequestedAction, State

admission_throttle = WriteThrottle()


def has_open_runs() -> bool:
    """Whether a run has not ended, or a device is still allocated or reserved."""
    return (
        Run.objects.filter(state__in=UNFINISHED).exists()
        or Allocation.objects.filter(released_at=None).exists()
        or Device.objects.exclude(reserved_for=None).exists()
    )


def admit_runs() -> list[int]:
    """Run one pass over every pool and return the runs that got a device.

    The caller notifies their workers after the commit.
    """
    with admission_throttle.atomic():
        # One pass at a time, over the devices and runs as they are now
        audit.acquire_advisory_lock("admission")
        requeue_lost_runs()
        now = timezone.now()
        stop_overdue_runs(now)
        Run.objects.filter(state=State.QUEUED, pool=None).update(pool=get_default_pool())
        allocations.clear_reservations(
            dict(Run.objects.filter(state=State.QUEUED).values_list("pk", "pool"))
        )
        typical_durations = durations.get_typical_durations()
        return [
            run_id
            for pool in Pool.objects.all()
            for run_id in admit_in_pool(pool, now, typical_durations)
        ]


def admit_in_pool(
    pool: Pool, now: datetime, typical_durations: dict[durations.RunKind, durations.TypicalDuration]
) -> list[int]:
    waiting = get_waiting_runs(pool)
    if not waiting:
        return []
    decision = Scheduler(build_pool_state(pool, waiting, now, typical_durations)).admit_runs(
        now.timestamp()
    )
    apply_decision(decision, {run.pk: run for run in waiting})
    return [started_run.run for started_run in decision.starts]


def apply_decision(decision: Decision, runs: dict[int, Run]) -> None:
    """Store the starts, released reservations and evictions of a pass."""
    devices = Device.objects.select_related("host").in_bulk(
        [started_run.device_id for started_run in decision.starts]
    )
    for started_run in decision.starts:
        run = runs[started_run.run]
        allocation_request = allocations.AllocationRequest(
            run.pk, run.name, run.owner, run.team, run.priority, started_run.memory
        )
        allocations.reserve_device(devices[started_run.device_id], allocation_request)
        assignment = {"device": str(devices[started_run.device_id])}
        Run.objects.filter(pk=run.pk).update(queue_info=assignment, revision=F("revision") + 1)
    Device.objects.filter(reserved_for__in=decision.released_reservations).update(reserved_for=None)
    for victim, preemptor in decision.evictions.items():
        allocations.evict_run(
            victim, reserve_for=preemptor, reason=f"frees a device for run {preemptor}"
        )


def run_admission_pass(*, skip_run: int = 0) -> None:
    """Run a pass now and notify the workers of the admitted runs.

    `skip_run` is a run that the caller supervises itself.
    """
    for run_id in admit_runs():
        if run_id != skip_run:
            run_queued.send(Run, run_id=run_id)


def get_waiting_runs(pool: Pool) -> list[Run]:
    """Runs that wait for a device of this pool. Runs that have one and wait for a worker do not."""
    allocated_runs = Allocation.objects.filter(released_at=None).values("run_id")
    rows = Run.objects.filter(pool=pool, state=State.QUEUED, lease_token="").exclude(
        pk__in=allocated_runs
    )
    return list(
        rows.select_related("owner", "team").defer(
            "config", "start_info", "auto_plan", "sparkline", "notes"
        )
    )


def build_pool_state(
    pool: Pool,
    waiting: Iterable[Run],
    now: datetime,
    typical_durations: dict[durations.RunKind, durations.TypicalDuration],
) -> PoolState:
    running = Run.objects.filter(pool=pool, state__in=ACTIVE).defer(
        "config", "start_info", "auto_plan", "sparkline"
    )
    waiting_runs = [build_waiting_run(run, now, typical_durations) for run in waiting]
    return load_pool_state(
        pool, now, waiting_runs, durations.estimate_ends(running, typical_durations, now)
    )


def build_waiting_run(
    run: Run, now: datetime, typical_durations: dict[durations.RunKind, durations.TypicalDuration]
) -> WaitingRun:
    return WaitingRun(
        run=run.pk,
        team=run.team_id or NO_TEAM,
        user=run.owner_id,
        submitted=run.queued_at.timestamp(),
        memory=run.forecast.get("peak"),
        priority=run.priority,
        seconds=durations.estimate_remaining_seconds(run, typical_durations),
        moved_up_at=run.moved_up_at.timestamp() if run.moved_up_at else 0.0,
        is_retry_due=run.not_before is None or run.not_before <= now,
    )


def requeue_lost_runs() -> None:
    """Requeue the runs of offline hosts, and release the devices of runs that have ended.

    The engines of such runs have exited by then, because the heartbeat times out before the lease.
    """
    is_lost = Q(device__host__reported_at__lt=Now() - HOST_TIMEOUT)
    lost_allocations = Allocation.objects.filter(is_lost, released_at=None).values_list(
        "run_id", "device__host__name"
    )
    for run_id, host in list(lost_allocations):
        lost_runs = Run.objects.filter(pk=run_id).filter(
            Q(state__in=ACTIVE, lease_expires_at__lt=Now()) | Q(state=State.QUEUED)
        )
        num_changed = lost_runs.update(
            state=State.QUEUED,
            lease_token="",
            lease_owner="",
            lease_expires_at=None,
            phase="",
            queue_info={},
            message=f"Host {host} is offline. The run resumes from its last checkpoint elsewhere.",
            revision=F("revision") + 1,
        )
        if num_changed:
            allocations.release_device(run_id)
    # A worker can die after it ended a run and before it released the device
    ended_allocations = Allocation.objects.filter(released_at=None).exclude(
        run_id__in=Run.objects.filter(state__in=UNFINISHED).values("pk")
    )
    for run_id in ended_allocations.values_list("run_id", flat=True):
        allocations.release_device(run_id)


def stop_overdue_runs(now: datetime) -> None:
    """Stop runs that have used devices for longer than their team's quota allows."""
    for quota in Quota.objects.exclude(max_run_seconds=None):
        team_allocations = Allocation.objects.filter(
            device__pool=quota.pool_id, team=quota.team_id, released_at=None
        )
        for run_id in list(team_allocations.values_list("run_id", flat=True)):
            excess_seconds = get_run_seconds(run_id, now) - float(quota.max_run_seconds or 0)
            overdue_runs = Run.objects.filter(
                pk=run_id,
                state__in=(State.STARTING, State.RUNNING),
                waived_seconds__lte=excess_seconds,
            )
            if overdue_runs.update(
                state=State.STOPPING,
                requested_action=RequestedAction.TIME_LIMIT,
                revision=F("revision") + 1,
            ):
                limit = {"max_run_seconds": quota.max_run_seconds}
                audit.record_entry(
                    None, "time limit reached", f"run {run_id}", team=quota.team, change=({}, limit)
                )


def get_max_runtime(run: Run) -> timedelta | None:
    """How long a run may use devices over all attempts, or None without a limit."""
    quota = (
        Quota.objects.filter(pool=run.pool_id, team=run.team_id)
        .exclude(max_run_seconds=None)
        .first()
    )
    return timedelta(seconds=quota.max_run_seconds) if quota and quota.max_run_seconds else None
