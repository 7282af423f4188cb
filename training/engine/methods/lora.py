"""LoRA (Hu et al. 2021): the update of a weight is a product of two thin matrices, scaled by alpha / rank."""

from __future__ import annotations

from typing import Any

from training.engine.config import ConfigError, RunConfig
from training.engine.methods.base import Method


def wrap(model: Any, config: RunConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = config.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ConfigError(f"target_modules {config.target_modules!r} does not fit this model: {error}") from error


METHOD = Method(title="LoRA", paper="https://arxiv.org/abs/2106.09685", wrap=wrap)
