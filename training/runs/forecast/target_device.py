"""The device that a run would train on, as its host last reported it. The web server needs no
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.devices import CPU, is_cpu, is_schedulable, read_devices
from training.gpus.models import Device, Pool


@dataclass(frozen=True)
class TargetDevice:
    """The device that a forecast is made for. Sizes are in bytes."""

    kind: str  # `cpu`, `cpu_fp32` (a CPU without bf16) or `cuda`, as memory estimators name it
    name: str
    total: int
    free: int
    pool: Pool | None = None  # None until a worker has reported a device
    is_schedulable: bool = True
    context_bytes: int | None = None  # of the CUDA context, once a run has measured it

    @property
    def description(self) -> str:
        text = f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"
        return text if self.is_schedulable else f"{text} at its last report; not schedulable now"


def get_target_device(pool: Pool | None = None) -> TargetDevice:
    """The best device of the pool (see `find_best_device`), by default of all pools. Until a worker
    has reported any device, the largest device of this host.
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
    """Prefer schedulable devices, then GPUs over CPUs, then the largest, then the one with the most
    free memory.
    """
    devices = Device.objects.select_related("host", "pool")
    candidates = devices.filter(pool=pool) if pool else devices.all()
    return max(
        candidates,
        key=lambda d: (is_schedulable(d), not is_cpu(d.pool.kind), d.total_bytes, -d.used_bytes),
        default=None,
    )


def get_default_pool() -> Pool | None:
    """The pool of the best device, or None if no device has ever been reported."""
    best = find_best_device(None)
    return best.pool if best else None


def get_device_kind(pool_kind: str) -> str:
    """Map a pool's kind, the driver's name of its devices, to the kinds of memory estimators."""
    if not is_cpu(pool_kind):
        return "cuda"
    return "cpu" if pool_kind == CPU else "cpu_fp32"
