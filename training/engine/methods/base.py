"""The interface of a fine-tuning method. torch and PEFT are imported inside `wrap_model`, so that
the site can import the table of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


@dataclass(frozen=True, kw_only=True)
class Method:
    """A fine-tuning method and its limits.

    `wrap_model(model, config)` returns a model with only the parameters of the method trainable. It
    raises ConfigError, as does `check_wrapped_model(model, config)`, which runs once before the
    first step for checks that need the wrapped model.

    `settings` are the names of its settings (training/engine/settings.py), `defaults` the values
    that differ from the defaults there. The `..._unsupported_reason` fields are sentences for
    users; an empty one means that the method supports it.
    """

    title: str
    description: str
    paper: str
    wrap_model: Callable[[Any, MethodSettings], Any]
    check_wrapped_model: Callable[[Any, MethodSettings], None] = lambda _wrapped, _config: None
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_range: str = "1e-4 to 1e-3"  # typical values
    max_learning_rate: float = 5e-3  # above it, the loss usually becomes unstable
    # A setting that cannot be turned on -> the reason
    incompatible_settings: Mapping[str, str] = field(default_factory=dict)
    has_quantized_base: bool = False  # the base model is loaded in 4 bits
    is_full_finetuning: bool = False  # the model itself is trained and saved, not an adapter
    merge_unsupported_reason: str = ""
    # Why rows of one batch cannot use different adapters
    mixed_batch_unsupported_reason: str = ""


MIXED_BATCH_UNSUPPORTED = "PEFT supports only one adapter per batch for this method."


def parse_target_modules(text: str) -> str | list[str]:
    """Parse the setting target_modules for PEFT: `all-linear`, or a list of names."""
    return (
        text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]
    )
