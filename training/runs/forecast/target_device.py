"""Where a run would train: a device of the pool that it waits for, as its host last reported it.
The web server needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.devices import CPU, is_cpu, read_devices, usable
from training.gpus.models import Device, Pool


@dataclass(frozen=True)
class Target:
    """The device that a forecast is made for. Bytes."""

    kind: str  # `cpu`, `cpu_fp32` (a CPU that has no bf16) or `cuda`: what memory laws are made for
    name: str
    total: int
    free: int
    pool: Pool | None = None  # None: no worker has reported a device yet
    given_out: bool = True
    context: int | None = None  # CUDA's own of a process, once a run has shown it

    @property
    def words(self) -> str:
        room = f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"
        return room if self.given_out else f"{room} when last heard of; not given out now"


def target_of(pool: Pool | None = None) -> Target:
    """The largest device of a pool, the one with most free memory first; without a pool, of the one
    that runs get by default.

    Until a worker has reported, it is what this host's own driver tells.
    """
    best = best_device(pool)
    if best is None:
        own = max(read_devices(), key=lambda one: one.total)
        return Target(kind_of(own.kind), own.name, own.total, own.total - own.used)
    free = max(0, best.total_bytes - best.used_bytes)
    return Target(
        kind_of(best.pool.kind),
        best.name,
        best.total_bytes,
        free,
        best.pool,
        usable(best),
        best.context_bytes,
    )


def best_device(pool: Pool | None) -> Device | None:
    """Those that are given out before others, a card before a CPU, then the largest, then the
    emptiest.
    """
    devices = Device.objects.select_related("host", "pool")
    some = devices.filter(pool=pool) if pool else devices.all()
    return max(
        some,
        key=lambda d: (usable(d), not is_cpu(d.pool.kind), d.total_bytes, -d.used_bytes),
        default=None,
    )


def default_pool() -> Pool | None:
    """The pool of the largest device that reports, a card before a CPU; where none does, of the
    largest ever seen.
    """
    best = best_device(None)
    return best.pool if best else None


def kind_of(pool_kind: str) -> str:
    """What laws are made for, of what the driver calls a device."""
    if not is_cpu(pool_kind):
        return "cuda"
    return "cpu" if pool_kind == CPU else "cpu_fp32"
