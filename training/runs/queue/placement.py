"""Where a run is to wait: the pool and its priority."""

from __future__ import annotations

from dataclasses import dataclass

from training.gpus.models import Pool
from training.runs.states import Priority


@dataclass(frozen=True)
class Placement:
    """The pool whose devices a run waits for, and its priority."""

    pool: Pool | None = None  # the default pool
    priority: str = Priority.NORMAL


DEFAULT_PLACEMENT = Placement()
