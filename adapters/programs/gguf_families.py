"""The model families that llama.cpp computes as transformers does, and their GGUF settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch

from training.errors import UserError

GEMMA_FULL_ATTENTION_INTERVAL = 6  # llama.cpp has no other pattern of sliding and full attention
GEMMA_27B_LAYERS = 62


@dataclass(frozen=True)
class Family:
    architecture: gguf.MODEL_ARCH
    activation: str = "silu"  # the only one that llama.cpp has for this family
    # For RoPE llama.cpp pairs neighboring dimensions; transformers pairs the halves of a head.
    is_llama: bool = False


FAMILIES = {  # by transformers' model_type
    "llama": Family(gguf.MODEL_ARCH.LLAMA, is_llama=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, is_llama=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh"),
    "gpt2": Family(gguf.MODEL_ARCH.GPT2, "gelu_new"),
}


def check_config(config: Any) -> None:
    """Raises UserError: llama.cpp would ignore a setting of the config or read it differently."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"GGUF export supports the model types {', '.join(FAMILIES)}; this model is of type "
            f"{model_type}."
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            "The weights are already quantized (by bitsandbytes, GPTQ or similar). Export the "
            "16-bit model."
        )
    activation_names = ("activation_function", "hidden_activation", "hidden_act")
    activation = next(getattr(config, name) for name in activation_names if hasattr(config, name))
    if activation != FAMILIES[model_type].activation:
        raise UserError(
            f"llama.cpp does not support {model_type} models with activation {activation}."
        )
    unsupported_switches = [
        "use_bidirectional_attention",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "add_cross_attention",
    ]
    for name in unsupported_switches + ["attention_bias"] * (not FAMILIES[model_type].is_llama):
        if getattr(config, name, None):
            raise UserError(f"llama.cpp has no {model_type} model with {name}.")
    if model_type == "gpt2" and (
        config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
    ):
        raise UserError(
            "llama.cpp does not support gpt2 models with non-default attention scaling."
        )
    if model_type == "gemma3_text":
        for layer, attention in enumerate(config.layer_types, start=1):
            if (attention == "full_attention") != (layer % GEMMA_FULL_ATTENTION_INTERVAL == 0):
                raise UserError(
                    "llama.cpp supports Gemma 3 only with full attention in exactly every sixth "
                    "layer."
                )


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    heads, context_length = config.num_attention_heads, config.max_position_embeddings
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_context_length(context_length)
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    window = getattr(config, "sliding_window", None)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(window)
    elif window:
        # llama.cpp has no window here, so limit the context to lengths at which a window has no
        # effect
        context_length = min(context_length, window)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(context_length)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    add_rope(writer, config)


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the RoPE settings. The factors of `llama3` are a tensor, written by `write_tensors`."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    sliding_rope = config.rope_parameters.get("sliding_attention", rope)
    rope_type = rope["rope_type"]
    supported_types = (
        ("default", "linear", "llama3")
        if FAMILIES[config.model_type].is_llama
        else ("default", "linear")
    )
    is_sliding_default = sliding_rope is rope or sliding_rope["rope_type"] == "default"
    if (
        rope_type not in supported_types
        or not is_sliding_default
        or rope.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise UserError(
            f"GGUF export does not support RoPE of type {rope_type!r} for {config.model_type} "
            "models."
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    if sliding_rope is not rope:
        writer.add_rope_freq_base_swa(sliding_rope["rope_theta"])
    if rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def gemma_attention_size(config: Any) -> int:
    """The size by which llama.cpp scales attention. It recognizes the 27B model, which is an
    exception, by its number of layers.
    """
    is_27b = config.num_hidden_layers == GEMMA_27B_LAYERS
    size: int = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    return size


def rope_factors(config: Any) -> torch.Tensor | None:
    """Divisors for llama.cpp's RoPE frequencies. None if they are the default frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    plain_frequencies = rope["rope_theta"] ** -(
        torch.arange(len(scaled_frequencies), dtype=torch.float64) / len(scaled_frequencies)
    )
    factors: torch.Tensor = (plain_frequencies / scaled_frequencies).float()
    return factors
