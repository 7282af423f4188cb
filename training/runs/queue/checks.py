"""Checks at launch and before a run is queued again: limits, priority, and whether the run could
ever start.
"""

from __future__ import annotations

from collections.abc import Callable

from django.conf import settings

from training.errors import Conflict, NotAllowed, UserError
from training.gpus import audit
from training.gpus.ledger import get_run_seconds
from training.gpus.models import PersonalQuota, Pool, Quota
from training.gpus.scheduling.load_state import load_static_limits
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import WaitingRun
from training.gpus.scheduling.wait_messages import format_block_reason
from training.people.models import Team, User
from training.runs.models import Run
from training.runs.queue import admission
from training.runs.states import Priority, State


def check_schedulable(
    pending: WaitingRun, pool: Pool | None, suggest_fit: Callable[[int], str]
) -> None:
    """Check that the run can start at some time in the pool.

    Raises:
        UserError: the run is too large for every device or for its team's quota, or may use no
            device. The message has the figures and what `suggest_fit` says would fit.
    """
    if pool is not None:
        check_device_limits(pending, pool)
    # Without a pool no worker has reported a device yet, and without memory there is no forecast
    if pool is not None and pending.memory:
        check_fits_pool(pool, pending, suggest_fit)


def check_device_limits(pending: WaitingRun, pool: Pool) -> None:
    """Raises UserError: the limit of the run's team or owner is 0, so the run would never start."""
    quota = (
        Quota.objects.filter(pool=pool, team=pending.team or None, limit=0)
        .select_related("team")
        .first()
    )
    if quota is not None:
        holder = f"team {quota.team}" if quota.team else "users without a team"
        raise UserError(
            f"The device limit for {holder} in {pool} is 0. Choose another pool or ask an admin.",
            field="pool",
            code="team_has_no_device",
        )
    if PersonalQuota.objects.filter(user=pending.user, max_running=0).exists():
        raise UserError(
            "Your device limit is 0. Ask an admin to raise it.", code="user_has_no_device"
        )


def check_queue_limit(user: User, *, count: int = 1) -> None:
    """Check that the user may queue `count` more runs: as many as an admin allowed, or
    SNAPML_MAX_QUEUED_RUNS. Locks the user's queue until the transaction ends, so that concurrent
    launches cannot exceed the limit together.

    Raises:
        Conflict: the limit would be exceeded.
    """
    audit.acquire_advisory_lock(f"queue of {user.pk}")
    quota = PersonalQuota.objects.filter(user=user).exclude(max_queued=None).first()
    limit = settings.MAX_QUEUED_RUNS if quota is None else quota.max_queued
    queued = Run.objects.filter(owner=user, state=State.QUEUED).count()
    if queued + count > (limit or 0):
        suffix = "" if count == 1 else f", and this would add {count}"
        raise Conflict(
            f"You have {queued} of at most {limit} runs in the queue{suffix}. Wait "
            "until one starts, or stop one.",
            code="queue_full",
        )


def get_max_bytes(pool: Pool | None, team: Team | None) -> int | None:
    """Bytes that a run of the team may reserve in the pool, or None without a limit."""
    quota = Quota.objects.filter(pool=pool, team=team).first()
    return quota.max_bytes if quota else None


def check_fits_pool(
    pool: Pool, pending: WaitingRun, suggest_fit: Callable[[int], str] = lambda _: ""
) -> None:
    """Raises UserError: the run is too large for the pool's devices or for the team's quota."""
    pool_state = load_static_limits(pool, pending.team)
    block = Scheduler(pool_state).find_permanent_block(pending)
    if block is not None:
        max_bytes = block.details.get("max_bytes", block.details.get("largest_device_bytes", 0))
        reason = format_block_reason(block, pool_state)
        message = f"This run can never start in {pool}: it {reason} {suggest_fit(int(max_bytes))}"
        raise UserError(message.strip(), code=block.code)


def check_time_limit(user: User, run: Run) -> None:
    """Check that a run may continue. If an admin continues a run that has reached its time limit,
    the time used so far is waived.

    Raises:
        NotAllowed: the run has reached its time limit, and the user is not an admin.
    """
    max_runtime, used = admission.get_max_runtime(run), get_run_seconds(run.pk)
    if max_runtime is not None and used - run.waived_seconds >= max_runtime.total_seconds():
        if user.is_superuser:
            Run.objects.filter(pk=run.pk).update(waived_seconds=used)
            change = {"waived_seconds": run.waived_seconds}, {"waived_seconds": used}
            audit.record_entry(user, "time waived", f"run {run.pk}", team=run.team, change=change)
            return
        hours = max_runtime.total_seconds() / 3600
        raise NotAllowed(
            f"{run.name} has reached its time limit of {hours:.1f} h. "
            "Only an admin can continue it.",
            code="time_limit_reached",
        )


def check_priority(user: User, *priorities: str) -> None:
    """Check priorities that a user sets or replaces.

    Raises:
        UserError: a priority does not exist.
        NotAllowed: only admins can grant or revoke `urgent`.
    """
    if not set(priorities) <= set(Priority.values):
        raise UserError(f"priority must be one of {', '.join(Priority.values)}.", field="priority")
    if Priority.URGENT in priorities and not user.is_superuser:
        raise NotAllowed(
            "Only admins can grant or revoke urgent priority.", code="urgent_admin_only"
        )
