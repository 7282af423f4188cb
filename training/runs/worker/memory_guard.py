"""Keep a run on a shared device within its reservation: by a limit of its allocator, and by
measuring the process.

The allocator's limit (SNAPML_DEVICE_BYTES) applies to CUDA only, not to memory that libraries
allocate themselves, and not to CPUs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psutil
from django.utils import timezone

from training.gpus import allocations
from training.gpus.devices import is_cpu
from training.gpus.models import Allocation, Device
from training.runs.forecast.memory import CONTEXT_BYTES
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Event, Run
from training.runs.queue.checks import get_max_bytes

# Forecasts are at most 6% off (docs/benchmarks.md), and drivers count whole pages
TOLERANCE = 1.1
# Bytes; a process that has more has other allocations on the device, too
MAX_CONTEXT_BYTES = 4 * 10**9
MIN_SAMPLES = 3  # in a row: ending a run does not help against a peak that is already over


class MemoryGuard:
    """Compares the memory of one run with what it has reserved on its device."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.allocation = allocations.get_allocation(run_id)
        self.samples: list[int] = []
        self.sampled_at: datetime | None = None

    def build_device_environment(self) -> dict[str, str]:
        """Variables for the engine: its visible GPU, and the limit of its allocator, which excludes
        CUDA's context.
        """
        if self.allocation is None or is_cpu(self.allocation.device.pool.kind):
            return {}
        environment = {"CUDA_VISIBLE_DEVICES": self.allocation.device.uuid}
        if self.allocation.reserved_bytes and self.allocation.device.pool.runs_per_device > 1:
            forecast = Run.objects.values_list("forecast", flat=True).get(pk=self.run_id)
            context = forecast.get("context", CONTEXT_BYTES["cuda"])
            environment["SNAPML_DEVICE_BYTES"] = str(
                max(1, self.allocation.reserved_bytes - context)
            )
        return environment

    def get_over_limit_bytes(self, pid: int | None) -> int:
        """The least memory that the engine used in the last MIN_SAMPLES samples, if it was above
        the limit in all of them and other runs share the device; else 0.
        """
        allocation = self.allocation
        if allocation is None or not allocation.reserved_bytes or pid is None:
            return 0
        if (
            not Allocation.objects.filter(device=allocation.device_id, released_at=None)
            .exclude(run_id=self.run_id)
            .exists()
        ):
            self.samples = []
            return 0
        used_bytes, sampled_at = read_process_memory(pid, allocation.device)
        if sampled_at != self.sampled_at:  # use each reading of the driver only once
            self.sampled_at = sampled_at
            self.samples = (
                [*self.samples, used_bytes][-MIN_SAMPLES:]
                if used_bytes > TOLERANCE * allocation.reserved_bytes
                else []
            )
        return min(self.samples) if len(self.samples) == MIN_SAMPLES else 0


def measure_context(allocation: Allocation | None, pid: int | None) -> None:
    """Measure CUDA's context on this device: the driver's figure for the engine, minus what the
    engine's allocator had at the steps before and after the reading.
    """
    if (
        allocation is None
        or pid is None
        or is_cpu(allocation.device.pool.kind)
        or allocation.device.context_bytes is not None
    ):
        return
    used_bytes, sampled_at = read_process_memory(pid, allocation.device)
    if not used_bytes:
        return  # the driver does not know this pid, as in a container with its own pid namespace
    events = Event.objects.filter(run_id=allocation.run_id)
    start_seq = (
        events.filter(kind="start").order_by("-seq").values_list("seq", flat=True).first() or 0
    )
    steps = events.filter(kind="step", seq__gt=start_seq)
    before = steps.filter(time__lte=sampled_at.timestamp()).order_by("-seq").first()
    after = steps.filter(time__gt=sampled_at.timestamp()).order_by("seq").first()
    reserved_bytes = [
        sum(device["reserved_bytes"] for device in step.fields.get("devices", ()))
        for step in (before, after)
        if step
    ]
    if (
        len(reserved_bytes) == 2
        and 0
        < reserved_bytes[0]
        == reserved_bytes[1]
        < used_bytes
        < reserved_bytes[0] + MAX_CONTEXT_BYTES
    ):
        allocation.device.context_bytes = used_bytes - reserved_bytes[0]
        allocation.device.save(update_fields=["context_bytes"])


def read_process_memory(pid: int, device: Device) -> tuple[int, datetime]:
    """Bytes that a process and its children use on a device, and the time of the reading.

    On a CPU it is the resident memory at this moment; on a GPU the last report of its host.
    """
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if is_cpu(device.pool.kind):
            return sum(int(one.memory_info().rss) for one in processes), timezone.now()
    except psutil.NoSuchProcess:
        return 0, timezone.now()
    pids = {one.pid for one in processes}
    reading: tuple[list[dict[str, Any]], datetime] = Device.objects.values_list(
        "processes", "host__reported_at"
    ).get(pk=device.pk)
    return sum(int(one["bytes"]) for one in reading[0] if one["pid"] in pids), reading[1]


def raise_forecast(run: Run, used_bytes: int) -> dict[str, Any] | None:
    """A higher forecast for a run that used more than it had reserved; None if no device of its
    pool allows as much.
    """
    target = get_target_device(run.pool)
    max_bytes = get_max_bytes(target.pool, run.team)
    peak = min(
        round(1.05 * used_bytes),
        target.total if max_bytes is None else min(target.total, max_bytes),
    )
    return run.forecast | {"peak": peak} if peak >= used_bytes else None
