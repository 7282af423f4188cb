"""Where a run is queued: the pool and the priority."""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.models import Pool
from training.runs.states import Priority


@dataclass(frozen=True)
class Placement:
    """The pool and the priority that a run is launched with."""

    pool: Pool | None = None  # None is the default pool
    priority: str = Priority.NORMAL


DEFAULT_PLACEMENT = Placement()
