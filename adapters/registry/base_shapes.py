"""The names and shapes of a base model's weights, and the sizes that its adapters must have. Pure
functions that read no tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import UserError

# Files without a head, as those of GPT-2 on the Hub, omit the name of the module that holds the
# layers. Their embeddings show it.
OMITTED_PREFIXES = {
    "wte.weight": "transformer.",
    "word_embeddings.weight": "transformer.",
    "embed_tokens.weight": "model.",
}
HEAD = "lm_head"
# Models whose linear layers store (inputs, outputs) instead of (outputs, inputs)
TRANSPOSED_MODELS = ("gpt2", "openai-gpt")
# Settings of models whose layers have heads of different sizes, of which PEFT takes the largest
UNEVEN_LAYERS = ("global_head_dim", "per_layer_config")


def find_weight_name(module: str, names: Collection[str], part: str = "weight") -> str | None:
    """The name of a module's weight or bias in the base's files. None if the model has no such
    module. A tied head is stored as the embeddings.
    """
    prefix = next((one for name, one in OMITTED_PREFIXES.items() if name in names), "")
    if module != HEAD and not module.startswith(prefix):
        return None  # a name of the inner model, such as GPT2Model's
    name = f"{module.removeprefix(prefix)}.{part}"
    if name in names or module != HEAD or part != "weight":
        return name if name in names else None
    tied = (name for name in names if name.endswith(("embed_tokens.weight", "wte.weight")))
    return next(tied, None)


@dataclass(frozen=True)
class BaseShapes:
    """The name of a base model, the shapes of its weights, and its config.json."""

    name: str
    shapes: Mapping[str, list[int]]
    config: Mapping[str, Any]

    def get_weight_shape(self, module: str) -> list[int]:
        """Raises UserError if the base has no such 2-dimensional weight."""
        name = find_weight_name(module, self.shapes)
        shape = self.shapes[name] if name else None
        if shape is None or len(shape) != 2:
            raise UserError(
                f"{self.name} has no weight {module[:80]!r}, which the adapter changes. Choose the "
                "base model it was trained on.",
                field="base",
                code="unknown_module",
            )
        return shape

    def get_features(self, module: str) -> tuple[int, int]:
        """How many inputs and outputs a linear layer has. Raises UserError: there is none."""
        first, last = self.get_weight_shape(module)
        is_transposed = self.config.get("model_type") in TRANSPOSED_MODELS and module != HEAD
        return (first, last) if is_transposed else (last, first)

    def get_prompt_sizes(self, method: str) -> dict[str, int]:
        """What PEFT writes for a prompt or prefix of this model: `token_dim`, and for a prefix also
        `num_layers` and `num_attention_heads`, which are those of keys and values. A size that
        config.json does not have is left out.
        """
        config = self.config.get("text_config") or self.config
        hidden = get_size(config, "hidden_size", "n_embd", "d_model")
        if method == "prompt":
            return {"token_dim": hidden} if hidden else {}
        layers = get_size(config, "num_hidden_layers", "num_layers", "n_layer")
        heads = get_size(config, "num_attention_heads", "n_head", "num_heads")
        key_heads = get_size(config, "num_key_value_heads") or heads
        head_size = get_size(config, "head_dim") or (hidden // heads if heads else 0)
        sizes = {"num_layers": layers}
        if not any(config.get(name) for name in UNEVEN_LAYERS):
            sizes |= {"num_attention_heads": key_heads, "token_dim": key_heads * head_size}
        return {name: size for name, size in sizes.items() if size}


def get_size(config: Mapping[str, Any], *names: str) -> int:
    """The first of these settings that has a size, or 0."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)
