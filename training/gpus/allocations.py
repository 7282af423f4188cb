"""Give devices out and take them back: the only two writes to the ledger. Both are called inside
one writer's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import audit
from training.gpus.devices import is_cpu, is_gone
from training.gpus.models import MOST_A_DEVICE, Allocation, Condition, Device
from training.people.models import Team, User


@dataclass(frozen=True)
class Holder:
    """The run that gets a device, as the ledger keeps it."""

    run_id: int
    name: str
    user: User
    team: Team | None
    priority: str
    reserved_bytes: int | None


def reserve(device: Device, holder: Holder) -> Allocation:
    """Book a place on a device. The database refuses a place that is taken (IntegrityError)."""
    taken = set(
        Allocation.objects.filter(device=device, released_at=None).values_list("place", flat=True)
    )
    place = next(place for place in range(MOST_A_DEVICE + 1) if place not in taken)
    if not taken:
        idle = max(0, device.used_bytes - device.answering_bytes)
        Device.objects.filter(pk=device.pk).update(idle_bytes=idle, busy_at=Now())
    Device.objects.filter(pk=device.pk, kept_for=holder.run_id).update(kept_for=None)
    made = Allocation.objects.create(
        device=device,
        place=place,
        run_id=holder.run_id,
        run_name=holder.name,
        user=holder.user,
        team=holder.team,
        priority=holder.priority,
        reserved_bytes=holder.reserved_bytes,
        started_at=timezone.now(),
    )
    audit.note(
        None,
        "admitted",
        f"run {holder.run_id}",
        team=holder.team,
        change=({}, {"device": str(device)}),
    )
    return made


def release(run_id: int) -> None:
    """The run's process is surely gone: close its interval. Its device is looked at before it is
    given out again.
    """
    open_ones = Allocation.objects.filter(run_id=run_id, released_at=None)
    for device_id, kind in list(open_ones.values_list("device", "device__pool__kind")):
        open_ones.filter(device=device_id).update(released_at=Now())
        if Allocation.objects.filter(device=device_id, released_at=None).exists():
            continue
        # Nobody checks a CPU: until its next report, what the run held is taken for free
        if is_cpu(kind):
            Device.objects.filter(pk=device_id).update(
                used_bytes=F("idle_bytes") + F("answering_bytes")
            )
        else:
            checked = Device.objects.filter(pk=device_id, condition=Condition.GOOD)
            checked.update(condition=Condition.CHECKING, changed_at=Now())


def evict(run_id: int, *, keep_for: int | None, reason: str) -> None:
    """Tell a run to save and leave its device; who watches it sees that within 250 ms."""
    held = (
        Allocation.objects.filter(run_id=run_id, released_at=None, evicted_at=None)
        .select_related("device", "team")
        .first()
    )
    if held is None:
        return
    Allocation.objects.filter(pk=held.pk).update(evicted_at=Now(), evicted_for=keep_for)
    if keep_for is not None:
        Device.objects.filter(pk=held.device_id).update(kept_for=keep_for)
    audit.note(
        None,
        "preempted",
        f"run {run_id}",
        team=held.team,
        change=({}, {"for": keep_for}),
        reason=reason,
    )


def forget_kept(pools: dict[int, int | None]) -> None:
    """Devices that are kept for runs that wait no more, or not there, or that cannot be given out.
    `pools`: of those who wait.
    """
    for device in Device.objects.exclude(kept_for=None).select_related("host"):
        broken = device.condition in (Condition.DIRTY, Condition.MISSING) or is_gone(device.host)
        if broken or pools.get(device.kept_for or 0) != device.pool_id:
            Device.objects.filter(pk=device.pk).update(kept_for=None)


def held_by(run_id: int) -> Allocation | None:
    """The device that a run holds now."""
    return (
        Allocation.objects.filter(run_id=run_id, released_at=None)
        .select_related("device__host", "device__pool")
        .first()
    )


def evicted(run_id: int) -> Allocation | None:
    """The device that the run has been told to leave."""
    return Allocation.objects.filter(
        run_id=run_id, released_at=None, evicted_at__isnull=False
    ).first()
