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
from training.runs.queue.checks import most_memory

TOLERANCE = 1.1  # forecasts are 6 % off at worst (docs/benchmarks.md), and a driver counts in pages
# Bytes; more is not a context, but a process that has something else there
MOST_CONTEXT = 4 * 10**9
LOOKS = 3  # in a row: a peak that is over before the next look has done its harm


class Share:
    """What one run may take of the device that it holds."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.held = allocations.held_by(run_id)
        self.seen: list[int] = []
        self.told_at: datetime | None = None

    def variables(self) -> dict[str, str]:
        """For the engine: the one card that it may see, and what its allocator may take of it
        beside CUDA's own context.
        """
        if self.held is None or is_cpu(self.held.device.pool.kind):
            return {}
        made = {"CUDA_VISIBLE_DEVICES": self.held.device.uuid}
        if self.held.reserved_bytes and self.held.device.pool.runs_per_device > 1:
            forecast = Run.objects.values_list("forecast", flat=True).get(pk=self.run_id)
            context = forecast.get("context", CONTEXT_BYTES["cuda"])
            made["SNAPML_DEVICE_BYTES"] = str(max(1, self.held.reserved_bytes - context))
        return made

    def exceeded(self, pid: int | None) -> int:
        """Bytes that the engine has taken at least over some looks, if that is too much and others
        run beside it; else 0.
        """
        held = self.held
        if held is None or not held.reserved_bytes or pid is None:
            return 0
        if (
            not Allocation.objects.filter(device=held.device_id, released_at=None)
            .exclude(run_id=self.run_id)
            .exists()
        ):
            self.seen = []
            return 0
        taken, told_at = memory_of(pid, held.device)
        if told_at != self.told_at:  # a driver's reading counts once, however often it is looked at
            self.told_at = told_at
            self.seen = (
                [*self.seen, taken][-LOOKS:] if taken > TOLERANCE * held.reserved_bytes else []
            )
        return min(self.seen) if len(self.seen) == LOOKS else 0


def measure_context(held: Allocation | None, pid: int | None) -> None:
    """What the card's driver says of the engine, less what the engine's allocator had of it at the
    steps before and after.
    """
    if (
        held is None
        or pid is None
        or is_cpu(held.device.pool.kind)
        or held.device.context_bytes is not None
    ):
        return
    taken, told_at = memory_of(pid, held.device)
    if not taken:
        return  # the driver does not know it, as in a container with pids of its own
    events = Event.objects.filter(run_id=held.run_id)
    started = (
        events.filter(kind="start").order_by("-seq").values_list("seq", flat=True).first() or 0
    )
    steps = events.filter(kind="step", seq__gt=started)
    before = steps.filter(time__lte=told_at.timestamp()).order_by("-seq").first()
    after = steps.filter(time__gt=told_at.timestamp()).order_by("seq").first()
    had = [
        sum(one["reserved_bytes"] for one in step.payload.get("devices", ()))
        for step in (before, after)
        if step
    ]
    if len(had) == 2 and 0 < had[0] == had[1] < taken < had[0] + MOST_CONTEXT:
        held.device.context_bytes = taken - had[0]
        held.device.save(update_fields=["context_bytes"])


def memory_of(pid: int, device: Device) -> tuple[int, datetime]:
    """Bytes that a process and its children take of a device, and since when that is known.

    On a CPU it is resident memory, now; of a card what its host last reported.
    """
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if is_cpu(device.pool.kind):
            return sum(int(one.memory_info().rss) for one in family), timezone.now()
    except psutil.NoSuchProcess:
        return 0, timezone.now()
    known = {one.pid for one in family}
    told: tuple[list[dict[str, Any]], datetime] = Device.objects.values_list(
        "processes", "host__reported_at"
    ).get(pk=device.pk)
    return sum(int(one["bytes"]) for one in told[0] if one["pid"] in known), told[1]


def raised(run: Run, taken: int) -> dict[str, Any] | None:
    """The forecast of a run that took more than it had reserved; None: nowhere in its pool may it
    have as much.
    """
    target = get_target_device(run.pool)
    most = most_memory(target.pool, run.team)
    peak = min(round(1.05 * taken), target.total if most is None else min(target.total, most))
    return run.forecast | {"peak": peak} if peak >= taken else None
