"""Where in a model of any family the sublayers end and the keys and values are made: names of
modules, told by their endings.
"""

from __future__ import annotations

from typing import Any

from training.errors import ConfigError

# Endings of Llama, Qwen, Gemma, Mistral, Phi-3; GPT-2; OPT; Phi-2; GPT-NeoX, Falcon, Bloom.
ATTENTION_ENDS = (
    "o_proj",
    "attn.c_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
)
FEED_FORWARD_ENDS = ("down_proj", "mlp.c_proj", "mlp.fc2", "layers.fc2", "dense_4h_to_h", "w2")
KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")


def sublayer_ends(model: Any) -> list[str]:
    return [*present(model, ATTENTION_ENDS, "attention"), *feed_forward_ends(model)]


def feed_forward_ends(model: Any) -> list[str]:
    return present(model, FEED_FORWARD_ENDS, "feed-forward")


def keys_and_values(model: Any) -> list[str]:
    return present(model, KEYS_AND_VALUES, "key and value")


def present(model: Any, endings: tuple[str, ...], what: str) -> list[str]:
    """Those of the endings that the model has.

    Raises:
        ConfigError: it has none of them.
    """
    names = [name for name, _ in model.named_modules()]
    found = [
        ending for ending in endings if any(f".{name}".endswith(f".{ending}") for name in names)
    ]
    if not found:
        raise ConfigError(
            f"This technique does not know the {what} layers of {type(model).__name__}; LoRA fits "
            "every model.",
            field="method",
        )
    return found
