"""What people do to waiting runs: move their own up, change a run's class or pool."""

from __future__ import annotations

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from training.engine.config import RunConfig
from training.errors import Conflict, NotAllowed
from training.gpus import allocations, audit
from training.gpus.models import Allocation, Pool
from training.gpus.scheduling.state import NO_TEAM, PendingJob
from training.people.models import User
from training.runs.forecast.memory import get_cached_forecast
from training.runs.forecast.target_device import get_target_device
from training.runs.forecast.token_lengths import get_cached_lengths
from training.runs.models import Run
from training.runs.queue.checks import check_fits_pool, check_priority
from training.runs.signals import run_changed
from training.runs.states import Priority, State


def move_up(run: Run) -> None:
    """To the front of its owner's own waiting runs; it passes nobody else's.

    Raises:
        Conflict: it does not wait.
    """
    queued_runs = Run.objects.filter(pk=run.pk, state=State.QUEUED)
    if not queued_runs.update(moved_up_at=timezone.now(), revision=F("revision") + 1):
        raise Conflict(f"{run.name} does not wait ({run.get_state_display().lower()}).")
    run_changed.send(Run, run_id=run.pk)


def audit_priority(user: User, run: Run) -> None:
    """A launch that an admin made urgent stands in the audit log; one that waits behind others is
    nobody's business.
    """
    if run.priority == Priority.URGENT:
        audit.record_entry(
            user, "class", f"run {run.pk}", team=run.team, change=({}, {"priority": run.priority})
        )


def change_priority(user: User, run: Run, priority: str, reason: str = "") -> None:
    """Raises NotAllowed: `urgent` is granted by admins, as any change of a run that holds a device;
    UserError: no such class.
    """
    check_priority(user, priority, run.priority)
    if priority == run.priority:
        return
    with transaction.atomic():
        open_allocations = Allocation.objects.select_for_update().filter(
            run_id=run.pk, released_at=None
        )
        if not user.is_superuser and list(open_allocations):
            # else a team could step out of its guarantee for a moment, have others stopped, and
            # step in again
            raise NotAllowed(
                f"{run.name} holds a device; only an admin changes its class now.",
                code="device_held",
            )
        Run.objects.filter(pk=run.pk).update(priority=priority, revision=F("revision") + 1)
        Allocation.objects.filter(run_id=run.pk, released_at=None).update(priority=priority)
        audit.record_entry(
            user,
            "class",
            f"run {run.pk}",
            team=run.team,
            change=({"priority": run.priority}, {"priority": priority}),
            reason=reason,
        )
    run.priority = priority
    run_changed.send(Run, run_id=run.pk)


def change_pool(user: User, run: Run, pool: Pool) -> None:
    """Let a waiting run wait for other devices; what it needs is told anew, for them.

    Raises:
        Conflict: it does not wait.
        UserError: it can never fit there.
    """
    if allocations.get_allocation(run.pk) is not None:
        raise Conflict(
            f"{run.name} has just been given a device of {run.pool}; stop it first.",
            code="device_given",
        )
    config = RunConfig.from_dict(run.config)
    lengths = get_cached_lengths(run.data, run.base_model, train_on_prompt=config.train_on_prompt)
    # If there is none, a worker makes it
    forecast = get_cached_forecast(config, run.base_model, lengths, get_target_device(pool)) or {}
    check_fits_pool(
        pool, PendingJob(run.pk, run.team_id or NO_TEAM, user.pk, 0.0, forecast.get("peak"))
    )
    changes = {"pool": pool, "forecast": forecast, "queue_info": {}, "revision": F("revision") + 1}
    if not Run.objects.filter(pk=run.pk, state=State.QUEUED).update(**changes):
        raise Conflict(f"{run.name} does not wait ({run.get_state_display().lower()}).")
    run_changed.send(Run, run_id=run.pk)
