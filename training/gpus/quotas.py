"""Edit pools, team quotas and personal quotas, and put pools and teams on hold.

An edit never stops a running run. Only *hold and drain* does.
"""

from __future__ import annotations

import math
from typing import Any

from django.db import transaction

from training.errors import NotAllowed, NotFound, UserError, to_one_line
from training.gpus import allocations, audit, usage
from training.gpus.models import (
    MAX_RUNS_PER_DEVICE,
    Allocation,
    Condition,
    Device,
    PersonalQuota,
    Pool,
    Quota,
)
from training.people.models import Team, User
from training.people.permissions import check_admin
from training.people.teams import can_manage_team

TEAM_FIELDS = (
    "guaranteed",
    "limit",
    "weight",
    "hours_per_month",
    "is_hard_budget",
    "max_bytes",
    "max_run_seconds",
)
PERSON_FIELDS = ("max_running", "max_queued", "hours_per_month", "is_hard_budget")
POOL_FIELDS = ("name", "runs_per_device", "min_run_seconds")
MAX_NUMBER = 2**53
EDIT_QUOTAS = "edit pools, devices and quotas"  # what only admins can do


def check_lead_or_admin(user: User) -> None:
    """Raises NotAllowed: neither an admin nor a lead of any team."""
    if not usage.can_view_quotas(user):
        raise NotAllowed(
            "Only admins and team leads can see quotas, reports and the audit log.",
            code="lead_or_admin_only",
        )


def get_pool(pool_id: int) -> Pool:
    """Raises NotFound: the pool does not exist."""
    pool = Pool.objects.filter(pk=pool_id).first()
    if pool is None:
        raise NotFound(f"Pool {pool_id} does not exist.", field="pool")
    return pool


def edit_pool(actor: User, pool: Pool, changes: dict[str, Any], reason: str = "") -> Pool:
    """Save changes to a pool.

    Raises:
        NotAllowed: the actor is not an admin.
        UserError: a value is out of range; `field` names it.
    """
    check_admin(actor, EDIT_QUOTAS)
    apply_pool_changes(pool, changes)
    changes = {name: value for name, value in changes.items() if name in POOL_FIELDS}
    saved: Pool = save_with_audit(actor, get_pool(pool.pk), changes, ("pool", str(pool)), reason)
    return saved


def apply_pool_changes(pool: Pool, changes: dict[str, Any]) -> Pool:
    """Check the changes and return a changed pool that is not saved.

    Raises:
        UserError: a value is out of range; `field` names it.
    """
    if "name" in changes:
        changes["name"] = to_one_line(str(changes["name"]))[:80]
        if (
            not changes["name"]
            or Pool.objects.filter(name=changes["name"]).exclude(pk=pool.pk).exists()
        ):
            raise UserError("The pool needs a unique name.", field="name")
    if not 1 <= int(changes.get("runs_per_device", 1)) <= MAX_RUNS_PER_DEVICE:
        raise UserError(
            f"runs_per_device must be 1 to {MAX_RUNS_PER_DEVICE}.", field="runs_per_device"
        )
    check_integer(changes, "min_run_seconds")
    edited = get_pool(pool.pk)
    for name in POOL_FIELDS:
        if name in changes:
            setattr(edited, name, changes[name])
    return edited


def get_quota(pool: Pool, team: Team | None) -> Quota:
    """The team's quota in the pool, or an unsaved one with the defaults."""
    return Quota.objects.filter(pool=pool, team=team).first() or Quota(pool=pool, team=team)


def apply_quota_changes(pool: Pool, team: Team | None, changes: dict[str, Any]) -> Quota:
    """Check the changes and return a changed quota that is not saved.

    Raises:
        UserError: a value is out of range, or the pool has fewer devices than are guaranteed.
    """
    quota = get_quota(pool, team)
    for name in ("guaranteed", "limit", "max_run_seconds"):
        check_integer(changes, name)
    check_integer(changes, "max_bytes", MAX_NUMBER)
    if changes.get("max_run_seconds") == 0:
        raise UserError(
            "max_run_seconds must be above 0. Leave it empty for no limit.", field="max_run_seconds"
        )
    check_positive(changes, "weight")
    check_positive(changes, "hours_per_month")
    for name in TEAM_FIELDS:
        if name in changes:
            setattr(quota, name, changes[name])
    if quota.guaranteed is None or quota.weight is None:
        raise UserError("guaranteed and weight must be numbers.", field="guaranteed")
    if quota.limit is not None and quota.limit < quota.guaranteed:
        raise UserError(
            f"The limit ({quota.limit}) is below the guarantee ({quota.guaranteed}). Raise the "
            "limit or lower the guarantee.",
            field="limit",
            code="limit_below_guarantee",
        )
    num_devices = pool.devices.exclude(condition=Condition.MISSING).count()
    others_guaranteed = sum(
        Quota.objects.filter(pool=pool).exclude(team=team).values_list("guaranteed", flat=True)
    )
    if changes.get("guaranteed") and others_guaranteed + quota.guaranteed > num_devices:
        raise UserError(
            f"Devices in {pool}: {num_devices}, of which other teams have {others_guaranteed} "
            "guaranteed. "
            f"Guarantee at most {max(0, num_devices - others_guaranteed)}.",
            field="guaranteed",
            code="guaranteed_too_many",
        )
    return quota


def edit_quota(
    actor: User, pool: Pool, team: Team | None, changes: dict[str, Any], reason: str = ""
) -> Quota:
    """Save changes to a team's quota.

    Raises:
        NotAllowed: the actor is not an admin.
        UserError: see `apply_quota_changes`.
    """
    check_admin(actor, EDIT_QUOTAS)
    with transaction.atomic():
        audit.acquire_advisory_lock("admission")
        quota = apply_quota_changes(pool, team, changes)
        before = get_quota(pool, team)
        quota.save(update_fields=list(TEAM_FIELDS) if quota.pk else None)
        old, new = ({name: getattr(one, name) for name in TEAM_FIELDS} for one in (before, quota))
        record_change(
            actor, "quota", f"{team or 'no team'} in {pool}", (old, new), team=team, reason=reason
        )
    return quota


def edit_personal_quota(
    actor: User, user: User, changes: dict[str, Any], reason: str = ""
) -> PersonalQuota:
    """Save changes to a user's limits.

    Raises:
        NotAllowed: the actor is not an admin.
        UserError: a value is out of range; `field` names it.
    """
    check_admin(actor, EDIT_QUOTAS)
    check_integer(changes, "max_running")
    check_integer(changes, "max_queued")
    check_positive(changes, "hours_per_month")
    quota, _ = PersonalQuota.objects.get_or_create(user=user)
    changes = {name: value for name, value in changes.items() if name in PERSON_FIELDS}
    saved: PersonalQuota = save_with_audit(actor, quota, changes, ("person", user.username), reason)
    return saved


def edit_disk_quota(
    actor: User, holder: User | Team, max_bytes: int | None, reason: str = ""
) -> None:
    """Save the disk quota of a user or team. None: the default. Nothing is deleted.

    Raises:
        NotAllowed: the actor is not an admin.
        UserError: the value is out of range.
    """
    check_admin(actor, EDIT_QUOTAS)
    changes = {"max_disk_bytes": max_bytes}
    check_integer(changes, "max_disk_bytes", MAX_NUMBER)
    subject = f"disk of {'team ' if isinstance(holder, Team) else ''}{holder}"
    save_with_audit(actor, holder, changes, ("quota", subject), reason)


def set_hold(
    actor: User, target: Pool | Quota, *, is_on_hold: bool, drain: bool = False, reason: str = ""
) -> None:
    """Stop new runs of a pool or of a team from starting, or lift the hold.

    With `drain`, running runs also save a checkpoint and wait. Admins and leads have separate
    holds; an admin lifts both.

    Raises:
        NotAllowed: the actor is neither an admin nor a lead of the team, or a lead tries to lift an
            admin's hold.
    """
    field_names = get_hold_fields(actor, target, is_on_hold)
    pool, team = (target, None) if isinstance(target, Pool) else (target.pool, target.team)
    with transaction.atomic():
        audit.acquire_advisory_lock("admission")
        before = any(getattr(target, name) for name in field_names)
        for name in field_names:
            setattr(target, name, is_on_hold)
        target.save(update_fields=field_names if target.pk else None)
        action = "hold and drain" if drain else "hold"
        if not is_on_hold:
            action = "lift hold"
        subject = str(pool) if isinstance(target, Pool) else f"{team or 'no team'} in {pool}"
        audit.record_entry(
            actor,
            action,
            subject,
            team=team,
            change=({"is_on_hold": before}, {"is_on_hold": is_on_hold}),
            reason=reason,
        )
        if is_on_hold and drain:
            open_allocations = Allocation.objects.filter(device__pool=pool, released_at=None)
            affected = (
                open_allocations if isinstance(target, Pool) else open_allocations.filter(team=team)
            )
            for run_id in affected.values_list("run_id", flat=True):
                allocations.evict_run(
                    run_id, reserve_for=None, reason=f"{action} by {actor.username}"
                )


def get_hold_fields(actor: User, target: Pool | Quota, is_on_hold: bool) -> list[str]:
    """The fields that this actor sets with a hold, or clears by lifting it."""
    if actor.is_superuser:
        if isinstance(target, Pool):
            return ["is_on_hold"]
        return ["has_admin_hold"] if is_on_hold else ["has_admin_hold", "has_lead_hold"]
    if isinstance(target, Pool) or target.team is None or not can_manage_team(actor, target.team):
        raise NotAllowed(
            "Only admins can put pools and other teams on hold. Leads can hold their own team.",
            code="hold_not_allowed",
        )
    if target.has_admin_hold and not is_on_hold:
        raise NotAllowed(
            f"An admin has put {target.team} on hold. Only an admin can lift this hold.",
            code="admin_hold",
        )
    return ["has_lead_hold"]


def return_to_service(actor: User, device: Device, reason: str = "") -> None:
    """Use a dirty device again although part of its memory is in use."""
    check_admin(actor, EDIT_QUOTAS)
    Device.objects.filter(pk=device.pk).update(
        condition=Condition.GOOD, baseline_bytes=max(0, device.used_bytes - device.inference_bytes)
    )
    change = ({"condition": device.condition}, {"condition": Condition.GOOD.value})
    audit.record_entry(actor, "return device", str(device), change=change, reason=reason)


def check_integer(changes: dict[str, Any], name: str, maximum: int = 2**31 - 1) -> None:
    """Raises UserError: the value is not an integer in the range."""
    value = changes.get(name)
    if value is not None and (
        not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum
    ):
        raise UserError(
            f"{name} must be an integer from 0 to {maximum:,}.", field=name, code="not_an_integer"
        )


def check_positive(changes: dict[str, Any], name: str) -> None:
    """Raises UserError: the value is not a positive number."""
    value = changes.get(name)
    if value is not None and not (math.isfinite(value) and 0 < value <= MAX_NUMBER):
        raise UserError(f"{name} must be a number above 0.", field=name, code="not_positive")


def save_with_audit(
    actor: User, row: Any, changes: dict[str, Any], audit_key: tuple[str, str], reason: str
) -> Any:
    """Save changes to a row with an audit entry. `audit_key` is the entry's action and subject."""
    old = {name: getattr(row, name) for name in changes}
    with transaction.atomic():
        for name, value in changes.items():
            setattr(row, name, value)
        row.save(update_fields=list(changes))
        record_change(actor, *audit_key, (old, changes), reason=reason)
    return row


def record_change(
    actor: User,
    action: str,
    subject: str,
    change: tuple[dict[str, Any], dict[str, Any]],
    **extra: Any,
) -> None:
    """Add an audit entry with the fields that changed, if there are any."""
    old, new = change
    names = [name for name in new if new[name] != old.get(name)]
    if names:
        audit.record_entry(
            actor,
            action,
            subject,
            change=({n: old.get(n) for n in names}, {n: new[n] for n in names}),
            **extra,
        )
