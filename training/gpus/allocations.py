"""Assign devices to runs and release them. Only this module writes to the ledger, always inside the
caller's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import audit
from training.gpus.devices import is_cpu, is_offline
from training.gpus.models import MAX_RUNS_PER_DEVICE, Allocation, Condition, Device
from training.people.models import Team, User


@dataclass(frozen=True)
class AllocationRequest:
    """The data of a run that the ledger stores when the run gets a device."""

    run_id: int
    name: str
    user: User
    team: Team | None
    priority: str
    reserved_bytes: int | None


def reserve_device(device: Device, allocation_request: AllocationRequest) -> Allocation:
    """Assign a slot of a device to a run.

    Raises:
        IntegrityError: the slot is occupied, or the run has a device already.
    """
    used_slots = set(
        Allocation.objects.filter(device=device, released_at=None).values_list("slot", flat=True)
    )
    slot = next(slot for slot in range(MAX_RUNS_PER_DEVICE + 1) if slot not in used_slots)
    if not used_slots:
        baseline_bytes = max(0, device.used_bytes - device.inference_bytes)
        Device.objects.filter(pk=device.pk).update(
            baseline_bytes=baseline_bytes, last_busy_at=Now()
        )
    Device.objects.filter(pk=device.pk, reserved_for=allocation_request.run_id).update(
        reserved_for=None
    )
    allocation = Allocation.objects.create(
        device=device,
        slot=slot,
        run_id=allocation_request.run_id,
        run_name=allocation_request.name,
        user=allocation_request.user,
        team=allocation_request.team,
        priority=allocation_request.priority,
        reserved_bytes=allocation_request.reserved_bytes,
        started_at=timezone.now(),
    )
    audit.record_entry(
        None,
        "admitted",
        f"run {allocation_request.run_id}",
        team=allocation_request.team,
        change=({}, {"device": str(device)}),
    )
    return allocation


def release_device(run_id: int) -> None:
    """Close the run's allocation once its process has ended.

    A GPU without another run is then checked before it is used again.
    """
    open_allocations = Allocation.objects.filter(run_id=run_id, released_at=None)
    for device_id, kind in list(open_allocations.values_list("device", "device__pool__kind")):
        open_allocations.filter(device=device_id).update(released_at=Now())
        if Allocation.objects.filter(device=device_id, released_at=None).exists():
            continue
        # A CPU is not checked. Until its next report, count the run's memory as free.
        if is_cpu(kind):
            Device.objects.filter(pk=device_id).update(
                used_bytes=F("baseline_bytes") + F("inference_bytes")
            )
        else:
            good_devices = Device.objects.filter(pk=device_id, condition=Condition.GOOD)
            good_devices.update(condition=Condition.CHECKING, condition_changed_at=Now())


def evict_run(run_id: int, *, reserve_for: int | None, reason: str) -> None:
    """Ask a run to save a checkpoint and free its device. Its supervisor reacts within 250 ms."""
    allocation = (
        Allocation.objects.filter(run_id=run_id, released_at=None, evicted_at=None)
        .select_related("device", "team")
        .first()
    )
    if allocation is None:
        return
    Allocation.objects.filter(pk=allocation.pk).update(evicted_at=Now(), evicted_for=reserve_for)
    if reserve_for is not None:
        Device.objects.filter(pk=allocation.device_id).update(reserved_for=reserve_for)
    audit.record_entry(
        None,
        "preempted",
        f"run {run_id}",
        team=allocation.team,
        change=({}, {"for": reserve_for}),
        reason=reason,
    )


def clear_reservations(waiting_pools: dict[int, int | None]) -> None:
    """Cancel reservations for runs that no longer wait in the device's pool, and reservations of
    unavailable devices.

    `waiting_pools` has the pool of every waiting run.
    """
    for device in Device.objects.exclude(reserved_for=None).select_related("host"):
        is_unavailable = device.condition in (Condition.DIRTY, Condition.MISSING) or is_offline(
            device.host
        )
        if is_unavailable or waiting_pools.get(device.reserved_for or 0) != device.pool_id:
            Device.objects.filter(pk=device.pk).update(reserved_for=None)


def get_allocation(run_id: int) -> Allocation | None:
    """The run's open allocation, or None."""
    return (
        Allocation.objects.filter(run_id=run_id, released_at=None)
        .select_related("device__host", "device__pool")
        .first()
    )


def get_pending_eviction(run_id: int) -> Allocation | None:
    """The run's open allocation if the run is being evicted, else None."""
    return Allocation.objects.filter(
        run_id=run_id, released_at=None, evicted_at__isnull=False
    ).first()
