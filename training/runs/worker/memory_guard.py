"""A run on a device that others use is held to what it reserved: by its allocator's own limit, and
by a look from outside.

The limit (SNAPML_DEVICE_BYTES) binds CUDA's allocator only, not what libraries take beside it, and
nothing on a CPU.
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

TOLERANCE = 1.1  # forecasts are 6 % off at worst (docs/benchmarks.md), and a driver counts in pages
# Bytes; more is not a context, but a process that has something else there
MAX_CONTEXT_BYTES = 4 * 10**9
MIN_SAMPLES = 3  # in a row: a peak that is over before the next look has done its harm


class MemoryGuard:
    """What one run may take of the device that it holds."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.allocation = allocations.get_allocation(run_id)
        self.samples: list[int] = []
        self.sampled_at: datetime | None = None

    def device_environment(self) -> dict[str, str]:
        """For the engine: the one card that it may see, and what its allocator may take of it
        beside CUDA's own context.
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
        """Bytes that the engine has taken at least over some looks, if that is too much and others
        run beside it; else 0.
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
        if (
            sampled_at != self.sampled_at
        ):  # a driver's reading counts once, however often it is looked at
            self.sampled_at = sampled_at
            self.samples = (
                [*self.samples, used_bytes][-MIN_SAMPLES:]
                if used_bytes > TOLERANCE * allocation.reserved_bytes
                else []
            )
        return min(self.samples) if len(self.samples) == MIN_SAMPLES else 0


def measure_context(allocation: Allocation | None, pid: int | None) -> None:
    """What the card's driver says of the engine, less what the engine's allocator had of it at the
    steps before and after.
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
        return  # the driver does not know it, as in a container with pids of its own
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
    """Bytes that a process and its children take of a device, and since when that is known.

    On a CPU it is resident memory, now; of a card what its host last reported.
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
    """The forecast of a run that took more than it had reserved; None: nowhere in its pool may it
    have as much.
    """
    target = get_target_device(run.pool)
    max_bytes = get_max_bytes(target.pool, run.team)
    peak = min(
        round(1.05 * used_bytes),
        target.total if max_bytes is None else min(target.total, max_bytes),
    )
    return run.forecast | {"peak": peak} if peak >= used_bytes else None
