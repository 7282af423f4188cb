"""Every worker host tells what devices it has and how they are: NVIDIA cards by NVML, or else its
CPU as one device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus import audit
from training.gpus.models import Condition, Device, Host, Pool
from training.process_identity import get_host_name

GONE_AFTER = timedelta(seconds=30)  # six reports
FRESH_FOR = timedelta(seconds=15)
BUSY_SHARE = 0.05
LEFT_OVER_BYTES = 500_000_000  # what a device may hold more than before the run, once that is gone
PATIENCE = timedelta(seconds=30)  # for the driver to take memory back
INFERENCE = "adapters.inference"  # how `manage.py up` starts it
log = logging.getLogger("snapml.devices")
CPU, CPU_FP32 = "CPU", "CPU without bf16"


@dataclass(frozen=True)
class Reading:
    """What one device says of itself. Bytes, degrees Celsius, watts; utilisation 0 to 1."""

    index: int
    uuid: str
    name: str
    kind: str
    total: int
    used: int
    utilisation: float | None = None
    temperature: float | None = None
    power_watts: float | None = None
    processes: list[dict[str, int]] = field(default_factory=list)
    answering: int = 0  # of the used bytes, those of SnapML's own inference program


def is_cpu(kind: str) -> bool:
    """Of a pool: is it no card?"""
    return kind in (CPU, CPU_FP32)


def read_devices() -> list[Reading]:
    """The NVIDIA cards of this host; none or no driver: its CPU. A card that cannot be read is left
    out, and no CPU stands in.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # no driver, no permission: all mean that the CPU trains
        count = 0
    if not count:
        return [read_cpu()]
    found = []
    for index in range(count):
        try:
            found.append(read_card(pynvml, index))
        except (
            pynvml.NVMLError
        ) as error:  # one that has fallen off the bus; the others are as good as before
            log.warning("Card %s cannot be read: %s", index, error)
    return found


def read_cpu() -> Reading:
    memory = psutil.virtual_memory()
    busy = psutil.cpu_percent(None) / 100
    name = f"CPU, {psutil.cpu_count()} cores"
    # A kind of its own: `auto` computes in fp32 there, with twice the memory
    kind = CPU if has_bf16() else CPU_FP32
    return Reading(
        0, f"cpu-{get_host_name()}", name, kind, memory.total, memory.total - memory.available, busy
    )


@cache
def has_bf16() -> bool:
    """Has this CPU the instruction that torch asks for before it computes in bf16? Only Linux
    tells.
    """
    told = Path("/proc/cpuinfo")
    return told.exists() and "avx512_bf16" in told.read_text()


def read_card(nvml: Any, index: int) -> Reading:
    card = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(card)
    name = str(nvml.nvmlDeviceGetName(card))

    def ask(what: Any, *more: Any) -> float | None:
        try:
            return float(what(card, *more))
        except nvml.NVMLError:  # not every card tells everything
            return None

    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(card)
        processes = [{"pid": int(p.pid), "bytes": int(p.usedGpuMemory or 0)} for p in running]
        utilisation = float(nvml.nvmlDeviceGetUtilizationRates(card).gpu) / 100
    except nvml.NVMLError:
        processes, utilisation = [], None
    return Reading(
        index,
        str(nvml.nvmlDeviceGetUUID(card)),
        name,
        name,
        int(memory.total),
        int(memory.used),
        utilisation,
        ask(nvml.nvmlDeviceGetTemperature, 0),
        (watts / 1000 if (watts := ask(nvml.nvmlDeviceGetPowerUsage)) is not None else None),
        processes,
        sum(one["bytes"] for one in processes if is_answering(one["pid"])),
    )


def is_answering(pid: int) -> bool:
    """Is this SnapML's inference program? It holds models as long as people ask, and leaves no
    run's memory behind.
    """
    try:
        return INFERENCE in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def report(readings: list[Reading] | None = None, host: str | None = None) -> None:
    """Write down what this host's devices say now. A device that it had and has no more is
    missing.
    """
    readings = read_devices() if readings is None else readings
    with transaction.atomic():
        audit.one_at_a_time("audit")  # before the devices, as an admission has it
        place, _ = Host.objects.update_or_create(
            name=host or get_host_name(), defaults={"reported_at": Now()}
        )
        known = {
            device.uuid: device
            for device in place.devices.select_for_update().select_related("pool")
        }
        for reading in readings:
            device = known.pop(reading.uuid, None) or moved_here(place, reading)
            # A virtual machine was moved to another CPU
            other = device.pool.kind != reading.kind[:80]
            if other and not device.allocations.filter(released_at=None).exists():
                device.pool = pool_of(reading.kind)
            take_reading(device, reading)
        for device in known.values():
            if device.condition != Condition.MISSING:
                device.condition, device.changed_at = Condition.MISSING, timezone.now()
                device.save()


def moved_here(host: Host, reading: Reading) -> Device:
    """A new device, or one that another host had: a card was moved, or the host has another name
    now.
    """
    found = (
        Device.objects.select_for_update().select_related("pool").filter(uuid=reading.uuid).first()
    )
    if found is None:
        return Device(host=host, uuid=reading.uuid, pool=pool_of(reading.kind))
    if not found.allocations.filter(released_at=None).exists():
        found.host = host  # else its run is given up first, since the old host is gone
    return found


def report_if_old() -> None:
    """Whoever is about to train here says first what is here, if nobody has lately."""
    if not Host.objects.filter(name=get_host_name(), reported_at__gt=Now() - FRESH_FOR).exists():
        report()


def pool_of(kind: str) -> Pool:
    """The pool of this kind of device; the first one of a kind makes it."""
    taken = Pool.objects.filter(name=kind[:80]).exclude(kind=kind[:80]).exists()
    name = f"{kind[:70]} (new)" if taken else kind[:80]
    return Pool.objects.get_or_create(kind=kind[:80], defaults={"name": name})[0]


def take_reading(device: Device, reading: Reading) -> None:
    now = timezone.now()
    device.index, device.name, device.total_bytes = reading.index, reading.name[:80], reading.total
    device.used_bytes, device.utilisation, device.answering_bytes = (
        reading.used,
        reading.utilisation,
        reading.answering,
    )
    device.temperature, device.power_watts, device.processes = (
        reading.temperature,
        reading.power_watts,
        reading.processes,
    )
    if reading.utilisation is None or reading.utilisation >= BUSY_SHARE:
        device.busy_at = now
    found = condition_of(device, reading, now)
    if found != device.condition:
        if found == Condition.DIRTY:
            audit.note(
                None,
                "device dirty",
                str(device),
                change=({}, {"used_bytes": reading.used, "idle_bytes": device.idle_bytes}),
            )
        device.condition, device.changed_at = found, now
    device.save()


def condition_of(device: Device, reading: Reading, now: Any) -> str:
    """A device that a run has left is good again when its memory is; after half a minute it is
    dirty instead.
    """
    clean = reading.used - reading.answering <= device.idle_bytes + LEFT_OVER_BYTES
    if device.condition == Condition.GOOD or clean:
        return Condition.GOOD
    # Back, and not empty: what it held before it went is looked at first
    if device.condition == Condition.MISSING:
        ours = (
            is_cpu(reading.kind)
            or device.pk is None
            or device.allocations.filter(released_at=None).exists()
        )
        return Condition.GOOD if ours or not device.idle_bytes else Condition.CHECKING
    if (
        device.condition == Condition.CHECKING
        and device.changed_at
        and now - device.changed_at < PATIENCE
    ):
        return Condition.CHECKING
    return Condition.DIRTY


def is_gone(host: Host) -> bool:
    """It has not reported for half a minute."""
    return bool(timezone.now() - host.reported_at > GONE_AFTER)


def usable(device: Device) -> bool:
    return device.condition == Condition.GOOD and not is_gone(device.host)
