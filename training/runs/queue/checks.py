"""What people do to the queue: move their own runs up, change a run's class or pool; and what a
launch is refused for at once.
"""

from __future__ import annotations

from collections.abc import Callable

from training.errors import Conflict, NotAllowed, UserError
from training.gpus import audit
from training.gpus.ledger import used_by_run
from training.gpus.models import PersonalQuota, Pool, Quota
from training.gpus.scheduling.explain import words
from training.gpus.scheduling.load_state import bounds_of
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import Request
from training.people.models import Team, User
from training.runs.models import Run
from training.runs.queue import admission
from training.runs.states import Priority, State


def refuse_hopeless(request: Request, pool: Pool | None, nearest: Callable[[int], str]) -> None:
    """Refuse a run that could never start: too large for every device or for its team's quota.

    Raises:
        UserError: it can never fit; the sentence has the numbers, and what `nearest` says would
            fit.
    """
    if pool is not None:
        refuse_without_devices(request, pool)
    # Else no worker has reported a device yet, or nobody knows yet what it needs
    if pool is not None and request.memory:
        refuse_never(pool, request, nearest)


def refuse_without_devices(request: Request, pool: Pool) -> None:
    """Raises UserError: the run's team or its owner may hold no device at all, so that it would
    wait for ever.
    """
    quota = (
        Quota.objects.filter(pool=pool, team=request.team or None, limit=0)
        .select_related("team")
        .first()
    )
    if quota is not None:
        who = f"Team {quota.team}" if quota.team else "Whoever has no team"
        raise UserError(
            f"{who} may hold no device of {pool}: the limit is 0. Choose another pool, or ask an "
            "admin.",
            field="pool",
            code="team_has_no_device",
        )
    if PersonalQuota.objects.filter(user=request.user, running=0).exists():
        raise UserError(
            "You may hold no device: your limit is 0. Ask an admin.", code="person_has_no_device"
        )


def refuse_full_queue(user: User, *, more: int = 1) -> None:
    """Raises Conflict: with so many more the person would have more waiting runs than they may.
    Counted and added by one at a time.
    """
    audit.one_at_a_time(f"queue of {user.pk}")
    quota = PersonalQuota.objects.filter(user=user).exclude(queued=None).first()
    queued = Run.objects.filter(owner=user, state=State.QUEUED).count()
    if quota is not None and queued + more > (quota.queued or 0):
        wanted = "" if more == 1 else f", and these are {more} more"
        raise Conflict(
            f"You have {queued} of at most {quota.queued} runs in the queue{wanted}; let one "
            "start, or stop one.",
            code="queue_full",
        )


def most_memory(pool: Pool | None, team: Team | None) -> int | None:
    """Bytes that a run of this team may reserve in a pool; None: what the device has."""
    quota = Quota.objects.filter(pool=pool, team=team).first()
    return quota.most_bytes if quota else None


def refuse_never(
    pool: Pool, request: Request, nearest: Callable[[int], str] = lambda _: ""
) -> None:
    """Raises UserError: no device of the pool, or no quota, would ever take it."""
    scene = bounds_of(pool, request.team)
    barrier = Scheduler(scene).never(request)
    if barrier is not None:
        most = int(barrier.facts.get("most", barrier.facts.get("largest", 0)))
        raise UserError(
            (
                f"This run can never start in {pool}: it {words(barrier, scene)} {nearest(most)}"
            ).strip(),
            code=barrier.why,
        )


def refuse_overdue(user: User, run: Run) -> None:
    """An admin forgives what it has used; it may then use as much again.

    Raises:
        NotAllowed: the run has held devices for as long as it may, and only an admin lets it go on.
    """
    longest, used = admission.longest_of(run), used_by_run(run.pk)
    if longest is not None and used - run.waived_seconds >= longest.total_seconds():
        if user.is_superuser:
            Run.objects.filter(pk=run.pk).update(waived_seconds=used)
            change = {"waived_seconds": run.waived_seconds}, {"waived_seconds": used}
            audit.note(user, "time forgiven", f"run {run.pk}", team=run.team, change=change)
            return
        hours = longest.total_seconds() / 3600
        raise NotAllowed(
            f"{run.name} has held devices for {hours:.1f} h, as long as it may; ask an admin to "
            "let it go on.",
            code="time_used_up",
        )


def refuse_class(user: User, *classes: str) -> None:
    """Raises UserError: there is no such class; NotAllowed: `urgent` is granted, and taken back, by
    admins.
    """
    if not set(classes) <= set(Priority.values):
        raise UserError(f"priority must be one of {', '.join(Priority.values)}.", field="priority")
    if Priority.URGENT in classes and not user.is_superuser:
        raise NotAllowed("Only an admin makes a run urgent, or takes that back.")
