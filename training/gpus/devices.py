"""Read the devices of a worker host and store their state: NVIDIA GPUs through NVML, or the CPU as
one device if there is no GPU.
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

HOST_TIMEOUT = timedelta(seconds=30)  # six reports
REPORT_MAX_AGE = timedelta(seconds=15)
MIN_BUSY_UTILIZATION = 0.05
MAX_LEFTOVER_BYTES = 500_000_000  # memory use after a run may exceed that before it by this much
CLEANUP_GRACE = timedelta(seconds=30)  # time for the driver to free memory after a run
INFERENCE_MODULE = "adapters.inference"  # how `manage.py up` starts the inference server
log = logging.getLogger("snapml.devices")
CPU, CPU_FP32 = "CPU", "CPU without bf16"


@dataclass(frozen=True)
class DeviceReading:
    """The state of one device. Bytes, degrees Celsius, watts; utilization is 0 to 1."""

    index: int
    uuid: str
    name: str
    kind: str
    total_bytes: int
    used_bytes: int
    utilization: float | None = None
    temperature: float | None = None
    power_watts: float | None = None
    processes: list[dict[str, int]] = field(default_factory=list)
    inference_bytes: int = 0  # the part of used_bytes that SnapML's inference server uses


def is_cpu(kind: str) -> bool:
    """Whether devices of this kind are CPUs."""
    return kind in (CPU, CPU_FP32)


def read_devices() -> list[DeviceReading]:
    """The NVIDIA GPUs of this host, or its CPU if it has no GPU or no driver.

    A GPU that cannot be read is left out; the CPU does not replace it.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # no driver or no permission: runs use the CPU
        count = 0
    if not count:
        return [read_cpu()]
    readings = []
    for index in range(count):
        try:
            readings.append(read_gpu(pynvml, index))
        except pynvml.NVMLError as error:  # this GPU has failed; the others still work
            log.warning("GPU %s cannot be read: %s", index, error)
    return readings


def read_cpu() -> DeviceReading:
    memory = psutil.virtual_memory()
    utilization = psutil.cpu_percent(None) / 100
    name = f"CPU, {psutil.cpu_count()} cores"
    # A separate kind, because `precision = auto` uses fp32 there, with twice the memory
    kind = CPU if has_bf16() else CPU_FP32
    return DeviceReading(
        0,
        f"cpu-{get_host_name()}",
        name,
        kind,
        memory.total,
        memory.total - memory.available,
        utilization,
    )


@cache
def has_bf16() -> bool:
    """Whether the CPU has the instruction that torch requires for bf16. Detected on Linux only."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def read_gpu(nvml: Any, index: int) -> DeviceReading:
    """Raises NVMLError: the GPU cannot be read."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = str(nvml.nvmlDeviceGetName(handle))

    def query(getter: Any, *args: Any) -> float | None:
        try:
            return float(getter(handle, *args))
        except nvml.NVMLError:  # not every GPU supports every query
            return None

    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        processes = [{"pid": int(p.pid), "bytes": int(p.usedGpuMemory or 0)} for p in running]
        utilization = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:
        processes, utilization = [], None
    return DeviceReading(
        index,
        str(nvml.nvmlDeviceGetUUID(handle)),
        name,
        name,
        int(memory.total),
        int(memory.used),
        utilization,
        query(nvml.nvmlDeviceGetTemperature, 0),
        (watts / 1000 if (watts := query(nvml.nvmlDeviceGetPowerUsage)) is not None else None),
        processes,
        sum(process["bytes"] for process in processes if is_inference_process(process["pid"])),
    )


def is_inference_process(pid: int) -> bool:
    """Whether the process is SnapML's inference server. Its memory does not make a device dirty."""
    try:
        return INFERENCE_MODULE in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def update_devices(readings: list[DeviceReading] | None = None, host: str | None = None) -> None:
    """Store the state of a host's devices. A known device without a reading becomes missing."""
    readings = read_devices() if readings is None else readings
    with transaction.atomic():
        # Before the devices: an admission takes its locks in this order, too
        audit.acquire_advisory_lock("audit")
        host_row, _ = Host.objects.update_or_create(
            name=host or get_host_name(), defaults={"reported_at": Now()}
        )
        known_devices = {
            device.uuid: device
            for device in host_row.devices.select_for_update().select_related("pool")
        }
        for reading in readings:
            device = known_devices.pop(reading.uuid, None) or adopt_device(host_row, reading)
            # The kind changes when a virtual machine moves to another CPU
            is_other_kind = device.pool.kind != reading.kind[:80]
            if is_other_kind and not device.allocations.filter(released_at=None).exists():
                device.pool = get_or_create_pool(reading.kind)
            apply_reading(device, reading)
        for device in known_devices.values():
            if device.condition != Condition.MISSING:
                device.condition, device.condition_changed_at = Condition.MISSING, timezone.now()
                device.save()


def adopt_device(host: Host, reading: DeviceReading) -> Device:
    """A new device, or a known one of another host: the GPU was moved or the host was renamed."""
    device = (
        Device.objects.select_for_update().select_related("pool").filter(uuid=reading.uuid).first()
    )
    if device is None:
        return Device(host=host, uuid=reading.uuid, pool=get_or_create_pool(reading.kind))
    if not device.allocations.filter(released_at=None).exists():
        # Otherwise its run is requeued first, because the old host is offline
        device.host = host
    return device


def update_devices_if_stale() -> None:
    """Update this host's devices unless a recent report exists."""
    if not Host.objects.filter(
        name=get_host_name(), reported_at__gt=Now() - REPORT_MAX_AGE
    ).exists():
        update_devices()


def get_or_create_pool(kind: str) -> Pool:
    """The pool of this kind of device. The first device of a kind creates it."""
    is_name_used = Pool.objects.filter(name=kind[:80]).exclude(kind=kind[:80]).exists()
    name = f"{kind[:70]} (new)" if is_name_used else kind[:80]
    return Pool.objects.get_or_create(kind=kind[:80], defaults={"name": name})[0]


def apply_reading(device: Device, reading: DeviceReading) -> None:
    """Store a reading, and the condition that follows from it."""
    now = timezone.now()
    device.index, device.name, device.total_bytes = (
        reading.index,
        reading.name[:80],
        reading.total_bytes,
    )
    device.used_bytes, device.utilization, device.inference_bytes = (
        reading.used_bytes,
        reading.utilization,
        reading.inference_bytes,
    )
    device.temperature, device.power_watts, device.processes = (
        reading.temperature,
        reading.power_watts,
        reading.processes,
    )
    if reading.utilization is None or reading.utilization >= MIN_BUSY_UTILIZATION:
        device.last_busy_at = now
    condition = compute_condition(device, reading, now)
    if condition != device.condition:
        if condition == Condition.DIRTY:
            audit.record_entry(
                None,
                "device dirty",
                str(device),
                change=(
                    {},
                    {"used_bytes": reading.used_bytes, "baseline_bytes": device.baseline_bytes},
                ),
            )
        device.condition, device.condition_changed_at = condition, now
    device.save()


def compute_condition(device: Device, reading: DeviceReading, now: Any) -> str:
    """The device's condition after a reading.

    A device that a run has left is good again once its memory is free. If that takes longer than
    CLEANUP_GRACE, it is dirty.
    """
    is_clean = (
        reading.used_bytes - reading.inference_bytes <= device.baseline_bytes + MAX_LEFTOVER_BYTES
    )
    if device.condition == Condition.GOOD or is_clean:
        return Condition.GOOD
    # A device that returns with memory in use is checked first, unless its run is still on it
    if device.condition == Condition.MISSING:
        is_expected = (
            is_cpu(reading.kind)
            or device.pk is None
            or device.allocations.filter(released_at=None).exists()
        )
        return Condition.GOOD if is_expected or not device.baseline_bytes else Condition.CHECKING
    if (
        device.condition == Condition.CHECKING
        and device.condition_changed_at
        and now - device.condition_changed_at < CLEANUP_GRACE
    ):
        return Condition.CHECKING
    return Condition.DIRTY


def is_offline(host: Host) -> bool:
    """Whether the host has not reported for HOST_TIMEOUT."""
    return bool(timezone.now() - host.reported_at > HOST_TIMEOUT)


def is_schedulable(device: Device) -> bool:
    """Whether runs may start on the device."""
    return device.condition == Condition.GOOD and not is_offline(device.host)
