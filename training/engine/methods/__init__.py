"""The techniques, one file each, and the one table of them. A technique says how a base model is wrapped, nothing more."""

from __future__ import annotations

from training.engine.methods import lora
from training.engine.methods.base import Method

TABLE: dict[str, Method] = {"lora": lora.METHOD}
