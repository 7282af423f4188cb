"""Patches for silent errors in PEFT, bitsandbytes and transformers. The `patch_` functions are
applied when this module is imported; `load_base` calls `disable_repacking`.

tests/engine/test_library_patches.py fails without them. Versions: peft 0.21.2, bitsandbytes 0.50.2,
transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftModelForCausalLM

# Registers the tuner, without which PEFT cannot load its adapters
import training.engine.methods.bottleneck_tuner  # noqa: F401
from training.errors import UserError

MIXED_BATCH_TUNERS = ("LORA", "BOTTLENECK")


def patch_cached_generation() -> None:
    """transformers renamed `past_key_values` to `cache`. PEFT finds no `past_key_values` and
    therefore inserts the prompt or prefix again at every token (logits are off by 0.2 to 1.0).
    """
    original = PeftModelForCausalLM.prepare_inputs_for_generation

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        base_prepare = self.base_model_prepare_inputs_for_generation

        def prepare_renamed(*inner_args: Any, **inner_kwargs: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = base_prepare(*inner_args, **inner_kwargs)
            if "cache" in inputs:
                inputs["past_key_values"] = inputs.pop("cache")
            return inputs

        if not self.active_peft_config.is_prompt_learning:
            return original(self, *args, **kwargs)  # type: ignore[no-any-return]
        self.base_model_prepare_inputs_for_generation = prepare_renamed
        try:
            model_inputs: dict[str, Any] = original(self, *args, **kwargs)
        finally:
            self.base_model_prepare_inputs_for_generation = base_prepare
        model_inputs["cache"] = model_inputs.pop("past_key_values", None)
        # The model derives them from the cache's length, which includes the virtual tokens
        model_inputs["position_ids"] = None
        return model_inputs

    PeftModelForCausalLM.prepare_inputs_for_generation = prepare_inputs


def disable_repacking(model: Any) -> Any:
    """On CPUs with AVX512-BF16, a forward in eval mode repacks NF4 weights in place. Later
    gradients are wrong (relative error 1.09) at almost the same loss, and merging returns garbage.
    Call this right after loading.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


def patch_ignored_names() -> None:
    """Most tuners ignore `adapter_names` without an error, and a call that PEFT rejects midway
    leaves its hooks installed.
    """
    original = PeftModel._enable_peft_forward_hooks

    @contextmanager
    def enable_checked_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            check_adapter_names(self, names, get_batch_size(args, kwargs))
        with original(self, *args, **kwargs):
            yield

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            check_adapter_names(self, kwargs["adapter_names"], get_batch_size(args, kwargs))
        return original_forward(self, *args, **kwargs)

    original_forward = PeftModelForCausalLM.forward
    PeftModel._enable_peft_forward_hooks = enable_checked_hooks
    PeftModelForCausalLM.forward = forward


def get_batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    return None if inputs is None else len(inputs)


def check_adapter_names(model: Any, names: list[str], batch_size: int | None) -> None:
    """Raises UserError: the rows of this batch cannot use these adapters."""
    if batch_size is not None and len(names) != batch_size:
        raise UserError(
            f"There are {len(names)} adapter names for {batch_size} rows. Give one name per row.",
            code="adapter_names_count",
        )
    for name in set(names) - {"__base__"}:
        config = model.peft_config.get(name)
        if config is None:
            raise UserError(
                f"No adapter {name!r} is loaded for this base model.", code="adapter_not_loaded"
            )
        if config.peft_type not in MIXED_BATCH_TUNERS or getattr(config, "use_dora", False):
            type_name = (
                "DoRA" if getattr(config, "use_dora", False) else str(config.peft_type.value)
            )
            raise UserError(
                f"Adapters of type {type_name} cannot share a batch. Use one adapter per batch.",
                code="mixed_batch_unsupported",
            )


patch_cached_generation()
patch_ignored_names()
