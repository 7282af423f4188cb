"""What admins hand out. An edit stops nothing that runs; *hold* and *hold and drain* are acts of
their own.
"""

from __future__ import annotations

import math
from typing import Any

from django.db import transaction

from training.errors import NotAllowed, NotFound, UserError, to_one_line
from training.gpus import allocations, audit, usage
from training.gpus.models import (
    MOST_A_DEVICE,
    Allocation,
    Condition,
    Device,
    PersonalQuota,
    Pool,
    Quota,
)
from training.people.models import Team, User
from training.people.teams import is_lead

TEAM_FIELDS = (
    "guaranteed",
    "limit",
    "weight",
    "hours_a_month",
    "hard",
    "most_bytes",
    "longest_seconds",
)
PERSON_FIELDS = ("running", "queued", "hours_a_month", "hard")
POOL_FIELDS = ("name", "runs_per_device", "shortest_seconds")
MOST = 2**53


def admins_only(actor: User) -> None:
    if not actor.is_superuser:
        raise NotAllowed("Only admins hand out devices.")


def refuse_strangers(user: User) -> None:
    """Raises NotAllowed: neither an admin nor a lead of any team."""
    if not usage.looks_into_quotas(user):
        raise NotAllowed(
            "Quotas, report and audit log are for admins, and for leads as far as they concern "
            "their teams."
        )


def get_pool(pool_id: int) -> Pool:
    """Raises NotFound: there is none."""
    found = Pool.objects.filter(pk=pool_id).first()
    if found is None:
        raise NotFound(f"There is no pool {pool_id}.", field="pool")
    return found


def edit_pool(actor: User, pool: Pool, changes: dict[str, Any], reason: str = "") -> Pool:
    """Raises NotAllowed; UserError: a value is out of its range, `field` names it."""
    admins_only(actor)
    checked_pool(pool, changes)
    changes = {name: value for name, value in changes.items() if name in POOL_FIELDS}
    return written(actor, get_pool(pool.pk), changes, ("pool", str(pool)), reason)  # type: ignore[no-any-return]


def checked_pool(pool: Pool, changes: dict[str, Any]) -> Pool:
    """The pool with these changes, not saved.

    Raises:
        UserError: a value is out of its range, `field` names it.
    """
    if "name" in changes:
        changes["name"] = to_one_line(str(changes["name"]))[:80]
        if (
            not changes["name"]
            or Pool.objects.filter(name=changes["name"]).exclude(pk=pool.pk).exists()
        ):
            raise UserError("The pool needs a name of its own.", field="name")
    if not 1 <= int(changes.get("runs_per_device", 1)) <= MOST_A_DEVICE:
        raise UserError(f"runs_per_device is 1 to {MOST_A_DEVICE}.", field="runs_per_device")
    whole(changes, "shortest_seconds")
    found = get_pool(pool.pk)
    for name in POOL_FIELDS:
        if name in changes:
            setattr(found, name, changes[name])
    return found


def quota_of(pool: Pool, team: Team | None) -> Quota:
    """What the team has of this pool; without a row, the defaults."""
    return Quota.objects.filter(pool=pool, team=team).first() or Quota(pool=pool, team=team)


def checked_quota(pool: Pool, team: Team | None, changes: dict[str, Any]) -> Quota:
    """The quota with these changes, not yet saved.

    Raises:
        UserError: a value is out of its range, or more is guaranteed than the pool has.
    """
    quota = quota_of(pool, team)
    for name in ("guaranteed", "limit", "longest_seconds"):
        whole(changes, name)
    whole(changes, "most_bytes", MOST)
    if changes.get("longest_seconds") == 0:
        raise UserError(
            "longest_seconds must be above 0; leave it empty for no end.", field="longest_seconds"
        )
    positive(changes, "weight")
    positive(changes, "hours_a_month")
    for name in TEAM_FIELDS:
        if name in changes:
            setattr(quota, name, changes[name])
    if quota.guaranteed is None or quota.weight is None:
        raise UserError("guaranteed and weight need a number.", field="guaranteed")
    if quota.limit is not None and quota.limit < quota.guaranteed:
        raise UserError(
            f"The limit ({quota.limit}) is below the guarantee ({quota.guaranteed}); raise it or "
            "lower that.",
            field="limit",
        )
    devices = pool.devices.exclude(condition=Condition.MISSING).count()
    others = sum(
        Quota.objects.filter(pool=pool).exclude(team=team).values_list("guaranteed", flat=True)
    )
    if changes.get("guaranteed") and others + quota.guaranteed > devices:
        raise UserError(
            f"{pool} has {devices} devices and {others} are guaranteed to others: at most "
            f"{max(0, devices - others)} are left.",
            field="guaranteed",
        )
    return quota


def edit_quota(
    actor: User, pool: Pool, team: Team | None, changes: dict[str, Any], reason: str = ""
) -> Quota:
    """Raises NotAllowed, UserError: see `checked_quota`."""
    admins_only(actor)
    with transaction.atomic():
        audit.one_at_a_time("admission")
        quota = checked_quota(pool, team, changes)
        before = quota_of(pool, team)
        quota.save(update_fields=list(TEAM_FIELDS) if quota.pk else None)
        old, new = ({name: getattr(one, name) for name in TEAM_FIELDS} for one in (before, quota))
        note_change(
            actor, "quota", f"{team or 'no team'} in {pool}", (old, new), team=team, reason=reason
        )
    return quota


def edit_person(
    actor: User, user: User, changes: dict[str, Any], reason: str = ""
) -> PersonalQuota:
    """Raises NotAllowed, UserError."""
    admins_only(actor)
    whole(changes, "running")
    whole(changes, "queued")
    positive(changes, "hours_a_month")
    quota, _ = PersonalQuota.objects.get_or_create(user=user)
    changes = {name: value for name, value in changes.items() if name in PERSON_FIELDS}
    return written(actor, quota, changes, ("person", user.username), reason)  # type: ignore[no-any-return]


def hold(
    actor: User, target: Pool | Quota, *, held: bool, drain: bool = False, reason: str = ""
) -> None:
    """Let nothing new start (of a team, or in a whole pool), or lift that. `drain`: what runs saves
    and waits, too.

    A lead's hold is a mark of its own beside the admins', who lift both.

    Raises:
        NotAllowed: neither an admin nor a lead of that team, or a lead would lift an admin's hold.
    """
    marks = marks_of(actor, target, held)
    pool, team = (target, None) if isinstance(target, Pool) else (target.pool, target.team)
    with transaction.atomic():
        audit.one_at_a_time("admission")
        before = any(getattr(target, name) for name in marks)
        for name in marks:
            setattr(target, name, held)
        target.save(update_fields=marks if target.pk else None)
        act = "hold and drain" if drain else "hold"
        if not held:
            act = "lift hold"
        subject = str(pool) if isinstance(target, Pool) else f"{team or 'no team'} in {pool}"
        audit.note(
            actor, act, subject, team=team, change=({"held": before}, {"held": held}), reason=reason
        )
        if held and drain:
            running = Allocation.objects.filter(device__pool=pool, released_at=None)
            concerned = running if isinstance(target, Pool) else running.filter(team=team)
            for run_id in concerned.values_list("run_id", flat=True):
                allocations.evict(run_id, keep_for=None, reason=f"{act} by {actor.username}")


def marks_of(actor: User, target: Pool | Quota, held: bool) -> list[str]:
    """The fields that this actor's hold sets, or lifting it clears."""
    if actor.is_superuser:
        return ["held"] if held or isinstance(target, Pool) else ["held", "held_by_lead"]
    if isinstance(target, Pool) or target.team is None or not is_lead(actor, target.team):
        raise NotAllowed("Admins put pools and teams on hold, and leads their own team.")
    if target.held and not held:
        raise NotAllowed(f"An admin has put {target.team} on hold; only admins lift that.")
    return ["held_by_lead"]


def offer_again(actor: User, device: Device, reason: str = "") -> None:
    """An admin has looked at a dirty device and gives it out although memory is held there."""
    admins_only(actor)
    Device.objects.filter(pk=device.pk).update(
        condition=Condition.GOOD, idle_bytes=max(0, device.used_bytes - device.answering_bytes)
    )
    change = ({"condition": device.condition}, {"condition": Condition.GOOD.value})
    audit.note(actor, "offer again", str(device), change=change, reason=reason)


def whole(changes: dict[str, Any], name: str, most: int = 2**31 - 1) -> None:
    value = changes.get(name)
    if value is not None and (
        not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most
    ):
        raise UserError(f"{name} must be a whole number from 0 to {most:,}.", field=name)


def positive(changes: dict[str, Any], name: str) -> None:
    value = changes.get(name)
    if value is not None and not (math.isfinite(value) and 0 < value <= MOST):
        raise UserError(f"{name} must be a number above 0.", field=name)


def written(
    actor: User, row: Any, changes: dict[str, Any], about: tuple[str, str], reason: str
) -> Any:
    old = {name: getattr(row, name) for name in changes}
    with transaction.atomic():
        for name, value in changes.items():
            setattr(row, name, value)
        row.save(update_fields=list(changes))
        note_change(actor, *about, (old, changes), reason=reason)
    return row


def note_change(
    actor: User, act: str, subject: str, change: tuple[dict[str, Any], dict[str, Any]], **more: Any
) -> None:
    """An entry with what is different; none if nothing is."""
    old, new = change
    names = [name for name in new if new[name] != old.get(name)]
    if names:
        audit.note(
            actor,
            act,
            subject,
            change=({n: old.get(n) for n in names}, {n: new[n] for n in names}),
            **more,
        )
