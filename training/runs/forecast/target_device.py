"""Where a run would train: a device of the pool that it waits for, as its host last reported it.
The web server needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.devices import CPU, is_cpu, is_schedulable, read_devices
from training.gpus.models import Device, Pool


@dataclass(frozen=True)
class TargetDevice:
    """The device that a forecast is made for. Bytes."""

    kind: str  # `cpu`, `cpu_fp32` (a CPU that has no bf16) or `cuda`: what memory laws are made for
    name: str
    total: int
    free: int
    pool: Pool | None = None  # None: no worker has reported a device yet
    is_schedulable: bool = True
    context_bytes: int | None = None  # CUDA's own of a process, once a run has shown it

    @property
    def description(self) -> str:
        text = f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"
        return text if self.is_schedulable else f"{text} when last heard of; not given out now"


def get_target_device(pool: Pool | None = None) -> TargetDevice:
    """The largest device of a pool, the one with most free memory first; without a pool, of the one
    that runs get by default.

    Until a worker has reported, it is what this host's own driver tells.
    """
    best = find_best_device(pool)
    if best is None:
        local_device = max(read_devices(), key=lambda one: one.total_bytes)
        return TargetDevice(
            get_device_kind(local_device.kind),
            local_device.name,
            local_device.total_bytes,
            local_device.total_bytes - local_device.used_bytes,
        )
    free = max(0, best.total_bytes - best.used_bytes)
    return TargetDevice(
        get_device_kind(best.pool.kind),
        best.name,
        best.total_bytes,
        free,
        best.pool,
        is_schedulable(best),
        best.context_bytes,
    )


def find_best_device(pool: Pool | None) -> Device | None:
    """Those that are given out before others, a card before a CPU, then the largest, then the
    emptiest.
    """
    devices = Device.objects.select_related("host", "pool")
    candidates = devices.filter(pool=pool) if pool else devices.all()
    return max(
        candidates,
        key=lambda d: (is_schedulable(d), not is_cpu(d.pool.kind), d.total_bytes, -d.used_bytes),
        default=None,
    )


def get_default_pool() -> Pool | None:
    """The pool of the largest device that reports, a card before a CPU; where none does, of the
    largest ever seen.
    """
    best = find_best_device(None)
    return best.pool if best else None


def get_device_kind(pool_kind: str) -> str:
    """What laws are made for, of what the driver calls a device."""
    if not is_cpu(pool_kind):
        return "cuda"
    return "cpu" if pool_kind == CPU else "cpu_fp32"
