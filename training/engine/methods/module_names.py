"""Finds the modules that end the sublayers or project keys and values, by the suffixes of their
names in all supported model families.
"""

from __future__ import annotations

from typing import Any

from training.errors import ConfigError

# Suffixes for Llama, Qwen, Gemma, Mistral, Phi-3; GPT-2; OPT; Phi-2; GPT-NeoX, Falcon, Bloom
ATTENTION_OUTPUT_NAMES = (
    "o_proj",
    "attn.c_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
)
MLP_OUTPUT_NAMES = ("down_proj", "mlp.c_proj", "mlp.fc2", "layers.fc2", "dense_4h_to_h", "w2")
KEY_VALUE_NAMES = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")


def find_sublayer_outputs(model: Any) -> list[str]:
    return [
        *find_existing_suffixes(model, ATTENTION_OUTPUT_NAMES, "attention"),
        *find_mlp_outputs(model),
    ]


def find_mlp_outputs(model: Any) -> list[str]:
    return find_existing_suffixes(model, MLP_OUTPUT_NAMES, "feed-forward")


def find_key_value_projections(model: Any) -> list[str]:
    return find_existing_suffixes(model, KEY_VALUE_NAMES, "key and value")


def find_existing_suffixes(model: Any, suffixes: tuple[str, ...], description: str) -> list[str]:
    """Return the suffixes that at least one module of the model has.

    Raises:
        ConfigError: the model has none of them.
    """
    names = [name for name, _ in model.named_modules()]
    existing = [
        suffix for suffix in suffixes if any(f".{name}".endswith(f".{suffix}") for name in names)
    ]
    if not existing:
        raise ConfigError(
            f"This method does not support {type(model).__name__}: its {description} layers have "
            "unknown names. LoRA supports every model.",
            field="method",
        )
    return existing
