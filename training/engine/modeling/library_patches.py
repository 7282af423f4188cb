"""Where PEFT, bitsandbytes and transformers go wrong without an error, and what cures it: each in
one place, applied on import.

tests/engine/test_cures.py fails without them. Versions: peft 0.21.2, bitsandbytes 0.50.2,
transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftModelForCausalLM

# registers the tuner, or PEFT refuses to load its adapters
import training.engine.methods.bottleneck_tuner  # noqa: F401
from training.errors import UserError

CAN_MIX = ("LORA", "BOTTLENECK")


def cure_cached_generation() -> None:
    """transformers calls the cache `cache` now; peft looks for `past_key_values`, finds none and
    injects prompt or prefix again at every token (logits off by 0.2 to 1.0).
    """
    original = PeftModelForCausalLM.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        plain = self.base_model_prepare_inputs_for_generation

        def renamed(*inner: Any, **more: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = plain(*inner, **more)
            if "cache" in inputs:
                inputs["past_key_values"] = inputs.pop("cache")
            return inputs

        if not self.active_peft_config.is_prompt_learning:
            return original(self, *args, **kwargs)  # type: ignore[no-any-return]
        self.base_model_prepare_inputs_for_generation = renamed
        try:
            made: dict[str, Any] = original(self, *args, **kwargs)
        finally:
            self.base_model_prepare_inputs_for_generation = plain
        made["cache"] = made.pop("past_key_values", None)
        made["position_ids"] = None  # told from the cache's length, which counts the virtual tokens
        return made

    PeftModelForCausalLM.prepare_inputs_for_generation = prepare


def cure_repacking(model: Any) -> Any:
    """On CPUs with AVX512-BF16 an eval forward repacks NF4 weights in place: later gradients are
    wrong (relative difference 1.09) at almost the same loss, and merging gives garbage. Call it
    right after loading.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


def cure_ignored_names() -> None:
    """Most tuners ignore `adapter_names` without an error, and a call that PEFT refuses half-way
    leaves its hooks behind.
    """
    original = PeftModel._enable_peft_forward_hooks

    @contextmanager
    def checked(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            refuse_names(self, names, rows_of(args, kwargs))
        with original(self, *args, **kwargs):
            yield

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            refuse_names(self, kwargs["adapter_names"], rows_of(args, kwargs))
        return plain_forward(self, *args, **kwargs)

    plain_forward = PeftModelForCausalLM.forward
    PeftModel._enable_peft_forward_hooks = checked
    PeftModelForCausalLM.forward = forward


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    return None if inputs is None else len(inputs)


def refuse_names(model: Any, names: list[str], rows: int | None) -> None:
    """Raises UserError: this batch cannot be shared by adapters, and why."""
    if rows is not None and len(names) != rows:
        raise UserError(f"{len(names)} adapter names for {rows} rows; give one a row.")
    for name in set(names) - {"__base__"}:
        config = model.peft_config.get(name)
        if config is None:
            raise UserError(f"There is no adapter {name!r} beside this base.")
        if config.peft_type not in CAN_MIX or getattr(config, "use_dora", False):
            kind = "DoRA" if getattr(config, "use_dora", False) else str(config.peft_type.value)
            raise UserError(
                f"Adapters of type {kind} cannot share a batch; ask them one at a time."
            )


cure_cached_generation()
cure_ignored_names()
