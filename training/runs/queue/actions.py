"""Actions on waiting runs: move a run up, change its priority or its pool."""

from __future__ import annotations

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from training.engine.config import RunConfig
from training.errors import Conflict, NotAllowed
from training.gpus import allocations, audit
from training.gpus.models import Allocation, Pool
from training.gpus.scheduling.state import NO_TEAM, WaitingRun
from training.people.models import User
from training.runs.forecast.memory import get_cached_forecast
from training.runs.forecast.target_device import get_target_device
from training.runs.forecast.token_lengths import get_run_lengths
from training.runs.models import Run
from training.runs.queue.checks import check_fits_pool, check_priority
from training.runs.signals import run_changed
from training.runs.states import Priority, State


def move_up(run: Run) -> None:
    """Move a run to the front of its owner's waiting runs. Runs of others keep their order.

    Raises:
        Conflict: the run is not queued.
    """
    queued_runs = Run.objects.filter(pk=run.pk, state=State.QUEUED)
    if not queued_runs.update(moved_up_at=timezone.now(), revision=F("revision") + 1):
        raise Conflict(
            f"{run.name} is not queued ({run.get_state_display().lower()}).", code="not_queued"
        )
    run_changed.send(Run, run_id=run.pk)


def audit_priority(user: User, run: Run) -> None:
    """Record the launch of an urgent run in the audit log. Other priorities need no record."""
    if run.priority == Priority.URGENT:
        audit.record_entry(
            user,
            "priority",
            f"run {run.pk}",
            team=run.team,
            change=({}, {"priority": run.priority}),
        )


def change_priority(user: User, run: Run, priority: str, reason: str = "") -> None:
    """Change the priority of a run.

    Raises:
        NotAllowed: only admins can grant `urgent` or change the priority of a run with a device.
        UserError: the priority does not exist.
    """
    check_priority(user, priority, run.priority)
    if priority == run.priority:
        return
    with transaction.atomic():
        open_allocations = Allocation.objects.select_for_update().filter(
            run_id=run.pk, released_at=None
        )
        if not user.is_superuser and list(open_allocations):
            # Otherwise a team could leave its guarantee for a moment, evict other runs, and return
            raise NotAllowed(
                f"{run.name} has a device. Only an admin can change its priority now.",
                code="device_in_use",
            )
        Run.objects.filter(pk=run.pk).update(priority=priority, revision=F("revision") + 1)
        Allocation.objects.filter(run_id=run.pk, released_at=None).update(priority=priority)
        audit.record_entry(
            user,
            "priority",
            f"run {run.pk}",
            team=run.team,
            change=({"priority": run.priority}, {"priority": priority}),
            reason=reason,
        )
    run.priority = priority
    run_changed.send(Run, run_id=run.pk)


def change_pool(user: User, run: Run, pool: Pool) -> None:
    """Move a waiting run to another pool, with a new memory forecast for the devices there.

    Raises:
        Conflict: the run is not queued, or it has just got a device.
        UserError: the run can never fit in the pool.
    """
    if allocations.get_allocation(run.pk) is not None:
        raise Conflict(
            f"{run.name} has just been assigned a device of {run.pool}. Stop it first.",
            code="device_assigned",
        )
    config = RunConfig.from_dict(run.config)
    lengths = get_run_lengths(run.data, run.base_model, config)
    # Without a cached forecast, a worker makes one
    forecast = get_cached_forecast(config, run.base_model, lengths, get_target_device(pool)) or {}
    check_fits_pool(
        pool, WaitingRun(run.pk, run.team_id or NO_TEAM, user.pk, 0.0, forecast.get("peak"))
    )
    changes = {"pool": pool, "forecast": forecast, "queue_info": {}, "revision": F("revision") + 1}
    if not Run.objects.filter(pk=run.pk, state=State.QUEUED).update(**changes):
        raise Conflict(
            f"{run.name} is not queued ({run.get_state_display().lower()}).", code="not_queued"
        )
    run_changed.send(Run, run_id=run.pk)
