"""LoRA (Hu et al. 2021): the update of a weight is a product of two low-rank matrices, scaled by
alpha / rank.

Its variants are settings: rsLoRA, DoRA, LoRA+, ranks by layer, and other initializations
(training/engine/modeling/adapter_init.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import Method, parse_target_modules
from training.errors import ConfigError

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings

LORA_SETTINGS = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "loraplus_lr_ratio",
    "rank_pattern",
    "alpha_pattern",
    "tuning_budget_fraction",
    "tuning_budget_minutes",
    "tuning_search_space",
)
# PEFT's init_lora_weights where it differs from ours. LoftQ is our own code: PEFT's needs CUDA.
PEFT_INIT_NAMES: dict[str, bool | str] = {"default": True, "loftq": True}


def wrap_model(model: Any, config: MethodSettings) -> Any:
    from peft import EvaConfig, LoraConfig, get_peft_model

    from training.engine.methods.fast_lora import use_fast_forward
    from training.engine.settings import parse_layer_pattern

    if config.init_lora_weights == "olora" and any(
        type(module).__name__ == "Conv1D" for module in model.modules()
    ):
        raise ConfigError(
            f"init_lora_weights = olora does not support {type(model).__name__}, which stores its "
            "weights transposed (a bug in PEFT). Use pissa.",
            field="init_lora_weights",
            code="transposed_weights",
        )
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=parse_target_modules(config.target_modules),
        init_lora_weights=PEFT_INIT_NAMES.get(config.init_lora_weights, config.init_lora_weights),
        # With rho = 1 every layer has the configured rank
        eva_config=EvaConfig(rho=1.0) if config.init_lora_weights == "eva" else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=parse_layer_pattern(config.rank_pattern),
        alpha_pattern=parse_layer_pattern(config.alpha_pattern),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(
            f"target_modules {config.target_modules!r} does not fit this model: {error}"
        ) from error
    use_fast_forward(wrapped, dropout=config.dropout)
    return wrapped


def check_rank_patterns(wrapped: Any, config: MethodSettings) -> None:
    """Raises ConfigError: a pattern names a layer that has no adapter, which PEFT ignores without
    an error.
    """
    from training.engine.settings import parse_layer_pattern

    adapted = {
        name.removesuffix(".lora_A")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A")
    }
    for setting_name in ("rank_pattern", "alpha_pattern"):
        for name in parse_layer_pattern(getattr(config, setting_name)):
            if not any(f".{layer}".endswith(f".{name}") for layer in adapted):
                known = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in adapted}))
                raise ConfigError(
                    f"{setting_name} has {name}, but the adapted layers are {known}.",
                    field=setting_name,
                )


SPEC = Method(
    title="LoRA",
    description="Learns a low-rank update of every weight. Nearly as good as full fine-tuning at a "
    "fraction of the memory.",
    paper="https://arxiv.org/abs/2106.09685",
    wrap_model=wrap_model,
    check_wrapped_model=check_rank_patterns,
    settings=LORA_SETTINGS,
)
