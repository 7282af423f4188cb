"""What a technique must say of itself. Torch and PEFT are imported inside `wrap`, so that the site
may read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


@dataclass(frozen=True, kw_only=True)
class Method:
    """`wrap(model, config)` gives a model whose trainable parameters are just the technique's; it
    raises ConfigError. So does
    `check(wrapped, config)`, once before the first step, of what only the whole model can tell.

    `settings` are the names in training/engine/settings.py that it has, `usual` what differs from
    their defaults. What it cannot do is a sentence that people read; an empty one means that it
    can.
    """

    title: str
    description: str
    paper: str
    wrap_model: Callable[[Any, MethodSettings], Any]
    check_wrapped_model: Callable[[Any, MethodSettings], None] = lambda _wrapped, _config: None
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_range: str = "1e-4 to 1e-3"  # learning rates that are usual
    max_learning_rate: float = 5e-3  # learning rates above it usually make the loss jump
    # A setting that cannot be switched on -> why
    incompatible_settings: Mapping[str, str] = field(default_factory=dict)
    has_quantized_base: bool = False  # the base model is loaded in 4 bits
    is_full_finetuning: bool = (
        False  # what is trained and saved is the model itself, not an adapter
    )
    merge_unsupported_reason: str = ""
    mixed_batch_unsupported_reason: str = ""  # why one batch cannot hold rows of several adapters


MIXED_BATCH_UNSUPPORTED = (
    "PEFT would ignore the names without an error; one batch uses one adapter."
)


def parse_target_modules(text: str) -> str | list[str]:
    """target_modules as PEFT wants them: `all-linear`, or a list of names."""
    return (
        text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]
    )
