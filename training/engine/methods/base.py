"""What a technique must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.engine.config import RunConfig


@dataclass(frozen=True)
class Method:
    """`wrap(model, config)` gives a PEFT model whose trainable parameters are just the technique's."""

    title: str
    paper: str
    wrap: Callable[[Any, RunConfig], Any]
