"""Where a run is to wait: the pool and its priority."""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.models import Pool
from training.runs.states import Priority


@dataclass(frozen=True)
class Where:
    """The devices that a run is to wait for, and its class."""

    pool: Pool | None = None  # those that runs get by default
    priority: str = Priority.NORMAL


ANYWHERE = Where()
