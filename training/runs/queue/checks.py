"""What people do to the queue: move their own runs up, change a run's class or pool; and what a
launch is refused for at once.
"""

from __future__ import annotations

from collections.abc import Callable

from training.errors import Conflict, NotAllowed, UserError
from training.gpus import audit
from training.gpus.ledger import used_by_run
from training.gpus.models import PersonalQuota, Pool, Quota
from training.gpus.scheduling.explain import format_block_reason
from training.gpus.scheduling.load_state import load_static_limits
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import PendingJob
from training.people.models import Team, User
from training.runs.models import Run
from training.runs.queue import admission
from training.runs.states import Priority, State


def check_schedulable(
    pending: PendingJob, pool: Pool | None, suggest_fit: Callable[[int], str]
) -> None:
    """Refuse a run that could never start: too large for every device or for its team's quota.

    Raises:
        UserError: it can never fit; the sentence has the numbers, and what `nearest` says would
            fit.
    """
    if pool is not None:
        check_device_limits(pending, pool)
    # Else no worker has reported a device yet, or nobody knows yet what it needs
    if pool is not None and pending.memory:
        check_fits_pool(pool, pending, suggest_fit)


def check_device_limits(pending: PendingJob, pool: Pool) -> None:
    """Raises UserError: the run's team or its owner may hold no device at all, so that it would
    wait for ever.
    """
    quota = (
        Quota.objects.filter(pool=pool, team=pending.team or None, limit=0)
        .select_related("team")
        .first()
    )
    if quota is not None:
        holder = f"Team {quota.team}" if quota.team else "Whoever has no team"
        raise UserError(
            f"{holder} may hold no device of {pool}: the limit is 0. Choose another pool, or ask an "
            "admin.",
            field="pool",
            code="team_has_no_device",
        )
    if PersonalQuota.objects.filter(user=pending.user, max_running=0).exists():
        raise UserError(
            "You may hold no device: your limit is 0. Ask an admin.", code="person_has_no_device"
        )


def check_queue_limit(user: User, *, count: int = 1) -> None:
    """Raises Conflict: with so many more the person would have more waiting runs than they may.
    Counted and added by one at a time.
    """
    audit.acquire_advisory_lock(f"queue of {user.pk}")
    quota = PersonalQuota.objects.filter(user=user).exclude(max_queued=None).first()
    queued = Run.objects.filter(owner=user, state=State.QUEUED).count()
    if quota is not None and queued + count > (quota.max_queued or 0):
        suffix = "" if count == 1 else f", and these are {count} more"
        raise Conflict(
            f"You have {queued} of at most {quota.max_queued} runs in the queue{suffix}; let one "
            "start, or stop one.",
            code="queue_full",
        )


def get_max_bytes(pool: Pool | None, team: Team | None) -> int | None:
    """Bytes that a run of this team may reserve in a pool; None: what the device has."""
    quota = Quota.objects.filter(pool=pool, team=team).first()
    return quota.max_bytes if quota else None


def check_fits_pool(
    pool: Pool, pending: PendingJob, suggest_fit: Callable[[int], str] = lambda _: ""
) -> None:
    """Raises UserError: no device of the pool, or no quota, would ever take it."""
    pool_state = load_static_limits(pool, pending.team)
    block = Scheduler(pool_state).find_permanent_block(pending)
    if block is not None:
        max_bytes = int(block.details.get("most", block.details.get("largest", 0)))
        raise UserError(
            (
                f"This run can never start in {pool}: it {format_block_reason(block, pool_state)} {suggest_fit(max_bytes)}"
            ).strip(),
            code=block.code,
        )


def check_time_limit(user: User, run: Run) -> None:
    """An admin forgives what it has used; it may then use as much again.

    Raises:
        NotAllowed: the run has held devices for as long as it may, and only an admin lets it go on.
    """
    max_runtime, used = admission.get_max_runtime(run), used_by_run(run.pk)
    if max_runtime is not None and used - run.waived_seconds >= max_runtime.total_seconds():
        if user.is_superuser:
            Run.objects.filter(pk=run.pk).update(waived_seconds=used)
            change = {"waived_seconds": run.waived_seconds}, {"waived_seconds": used}
            audit.record_entry(user, "time forgiven", f"run {run.pk}", team=run.team, change=change)
            return
        hours = max_runtime.total_seconds() / 3600
        raise NotAllowed(
            f"{run.name} has held devices for {hours:.1f} h, as long as it may; ask an admin to "
            "let it go on.",
            code="time_used_up",
        )


def check_priority(user: User, *priorities: str) -> None:
    """Raises UserError: there is no such class; NotAllowed: `urgent` is granted, and taken back, by
    admins.
    """
    if not set(priorities) <= set(Priority.values):
        raise UserError(f"priority must be one of {', '.join(Priority.values)}.", field="priority")
    if Priority.URGENT in priorities and not user.is_superuser:
        raise NotAllowed("Only an admin makes a run urgent, or takes that back.")
