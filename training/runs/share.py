"""A run on a device that others use, too, is held to what it reserved: by the allocator's own limit, and by a look from outside.

The limit (SNAPML_DEVICE_BYTES) binds CUDA's allocator only, not what libraries take beside it, and nothing on a CPU.
"""

from __future__ import annotations

from typing import Any

import psutil

from training.gpus import reserve
from training.gpus.devices import CPU
from training.gpus.models import Allocation, Device

TOLERANCE = 1.1  # forecasts are 5 % off at worst (docs/benchmarks.md), and a driver counts in pages
LOOKS = 3  # in a row: a peak that is over before the next look has done its harm


class Share:
    """What one run may take of the device that it holds."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.held = reserve.held_by(run_id)
        self.seen: list[int] = []

    @property
    def bytes(self) -> int | None:
        """None: the device is the run's alone."""
        return self.held.reserved_bytes if self.held and self.held.device.pool.runs_per_device > 1 else None

    def variables(self) -> dict[str, str]:
        """For the engine: the one card that it may see, and its share of the memory."""
        if self.held is None or self.held.device.pool.kind == CPU:
            return {}
        return {"CUDA_VISIBLE_DEVICES": self.held.device.uuid} | ({"SNAPML_DEVICE_BYTES": str(self.bytes)} if self.bytes else {})

    def exceeded(self, pid: int | None) -> int:
        """Bytes that the engine has taken at least over some looks, if that is too much and others run beside it; else 0."""
        if self.held is None or self.bytes is None or pid is None:
            return 0
        others = Allocation.objects.filter(device=self.held.device_id, released_at=None).exclude(run_id=self.run_id)
        taken = memory_of(pid, self.held.device)
        self.seen = [*self.seen, taken][-LOOKS:] if taken > TOLERANCE * self.bytes and others.exists() else []
        return min(self.seen) if len(self.seen) == LOOKS else 0


def memory_of(pid: int, device: Device) -> int:
    """Bytes that a process and its children take of a device: on a CPU resident memory, else what the driver last told."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if device.pool.kind == CPU:
            return sum(int(one.memory_info().rss) for one in family)
    except psutil.NoSuchProcess:
        return 0
    known = {one.pid for one in family}
    told: list[dict[str, Any]] = Device.objects.values_list("processes", flat=True).get(pk=device.pk)
    return sum(int(one["bytes"]) for one in told if one["pid"] in known)
