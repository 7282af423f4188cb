"""Where in a model of any family the sublayers end and the keys and values are made: names of
modules, told by their endings.
"""

from __future__ import annotations

from typing import Any

from training.errors import ConfigError

# Endings of Llama, Qwen, Gemma, Mistral, Phi-3; GPT-2; OPT; Phi-2; GPT-NeoX, Falcon, Bloom.
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
    """Those of the endings that the model has.

    Raises:
        ConfigError: it has none of them.
    """
    names = [name for name, _ in model.named_modules()]
    existing = [
        suffix for suffix in suffixes if any(f".{name}".endswith(f".{suffix}") for name in names)
    ]
    if not existing:
        raise ConfigError(
            f"This technique does not know the {description} layers of {type(model).__name__}; LoRA fits "
            "every model.",
            field="method",
        )
    return existing
