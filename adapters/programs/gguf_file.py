"""Write a causal language model (config, safetensors, tokenizer) as a GGUF file for llama.cpp.

Tensors are converted one after another, so only one is in memory at a time. A model that llama.cpp
would compute differently raises a UserError; a written file gives the same answers as the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from safetensors import safe_open

from adapters.programs.gguf_families import (
    FAMILIES,
    add_settings,
    check_config,
    gemma_attention_size,
    rope_factors,
)
from adapters.programs.gguf_tokenizer import add_tokenizer
from training.errors import UserError

# All formats that the package `gguf` can write. It cannot write K-quants.
QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK_QUANTIZED = {Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0}
BLOCK_SIZE = 32  # values of a row that are quantized together in these formats


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the GGUF file: its source, and its name, shape and format there."""

    file: Path
    source_name: str
    name: str
    shape: tuple[int, ...]
    quant_type: Kind


def write_gguf(folder: Path, target: Path, quantization: str) -> None:
    """Write the model of `folder` to the file `target`, completely or not at all."""
    from transformers import AutoConfig, AutoTokenizer

    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization is {quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}."
        )
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder.name} is not a complete model: it has no config.json. Merge an adapter into "
            "its base model first."
        )
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder.name} has no tokenizer.json, which GGUF export needs.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_config(config)
    plans = list(plan_tensors(folder, config, Kind[quantization.upper()]))
    rows = {plan.name: plan.shape[0] for plan in plans}
    check_complete(rows.keys(), config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[FAMILIES[config.model_type].architecture])
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(
        FileType["ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, config)
    add_tokenizer(
        writer,
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        rows=rows["token_embd.weight"],
    )
    partial_path = target.with_name(f".{target.name}.partial")
    try:
        write_tensors(writer, partial_path, plans, config)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    partial_path.replace(target)


def plan_tensors(folder: Path, config: Any, requested_type: Kind) -> Iterator[TensorPlan]:
    """Every tensor with llama.cpp's name for it, in the order of the files. Reads no values."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder.name} has no model*.safetensors, which GGUF export needs.")
    names = gguf.get_tensor_name_map(
        FAMILIES[config.model_type].architecture, config.num_hidden_layers
    )
    for file in files:
        with safe_open(file, "pt") as tensors:
            for source in tensors.keys():  # noqa: SIM118 - not a dict
                if is_redundant(source, config):
                    continue
                lacks_prefix = config.model_type == "gpt2" and not source.startswith("transformer.")
                name = names.get_name(
                    f"transformer.{source}" if lacks_prefix else source, (".weight", ".bias")
                )
                tensor_slice = tensors.get_slice(source)
                if name is None or tensor_slice.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(
                        f"The tensor {source} ({tensor_slice.get_dtype()}) cannot be stored in a "
                        f"{config.model_type} GGUF file."
                    )
                shape = tuple(tensor_slice.get_shape())[:: -1 if is_transposed(name, config) else 1]
                yield TensorPlan(
                    file, source, name, shape, choose_quant_type(name, shape, requested_type)
                )


def check_complete(names: Collection[str], config: Any) -> None:
    """Raises UserError: tensors are missing. llama.cpp would fail later and less clearly."""
    layers = Counter(name.split(".", 2)[2] for name in names if name.startswith("blk."))
    missing = [
        f"{name} of some layers"
        for name, count in layers.items()
        if count != config.num_hidden_layers
    ]
    required_names = ["token_embd.weight", "output_norm.weight"] + ["output.weight"] * (
        not config.tie_word_embeddings
    )
    missing += [name for name in required_names if name not in names]
    if missing or not layers:
        raise UserError(
            f"The weights are incomplete. Missing: {', '.join(missing) or 'all layers'}."
        )


def is_redundant(source: str, config: Any) -> bool:
    """A head that is tied to the embedding, and buffers in files of old transformers versions."""
    is_tied_head = source == "lm_head.weight" and config.tie_word_embeddings
    return is_tied_head or source.endswith(
        (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    )


def is_transposed(name: str, config: Any) -> bool:
    """Only GPT-2 stores the matrices of its blocks as (in, out)."""
    return (
        config.model_type == "gpt2"
        and name.startswith("blk.")
        and name.endswith(".weight")
        and "_norm." not in name
    )


def choose_quant_type(name: str, shape: tuple[int, ...], requested_type: Kind) -> Kind:
    """Vectors and learned positions stay f32, as llama.cpp requires. Rows that do not divide into
    blocks become f16.
    """
    if len(shape) < 2 or name == "position_embd.weight":
        return Kind.F32
    if requested_type in BLOCK_QUANTIZED and shape[-1] % BLOCK_SIZE:
        return Kind.F16
    if requested_type in BLOCK_QUANTIZED and name in ("token_embd.weight", "output.weight"):
        return Kind.Q8_0  # the embedding and the head lose most with fewer bits
    return requested_type


def convert_layout(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """The weights in llama.cpp's layout, which computes the same function."""
    if is_transposed(name, config):
        return tensor.T
    if FAMILIES[config.model_type].is_llama and name.split(".")[-2] in (
        "attn_q",
        "attn_k",
    ):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and "norm" in name:
        tensor = tensor.float() + 1.0  # Gemma stores them as an offset from 1
        # llama.cpp scales attention by a fixed size; Gemma by query_pre_attn_scalar.
        if "attn_q_norm" in name:
            tensor = tensor * math.sqrt(gemma_attention_size(config) / config.query_pre_attn_scalar)
    return tensor


def quantize_tensor(tensor: torch.Tensor, plan: TensorPlan) -> np.ndarray[Any, Any]:
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(plan.quant_type, torch.float32)
    as_float = tensor.to(dtype)
    if not as_float.isfinite().all():
        raise UserError(
            f"The tensor {plan.source_name} has values that are not finite or too large for "
            f"{plan.quant_type.name}."
        )
    if plan.quant_type is Kind.BF16:
        return as_float.contiguous().view(torch.int16).numpy()
    packed: np.ndarray[Any, Any] = gguf.quants.quantize(
        as_float.contiguous().numpy(), plan.quant_type
    )
    return packed


def write_tensors(
    writer: gguf.GGUFWriter, path: Path, plans: list[TensorPlan], config: Any
) -> None:
    """Write the description of all tensors, then their values, one tensor after another."""
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes, Kind.F32
        )
    for plan in plans:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[plan.quant_type]
        writer.add_tensor_info(
            plan.name,
            plan.shape,
            np.dtype(np.float32),
            math.prod(plan.shape) // block_size * block_bytes,
            plan.quant_type,
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for plan in plans:
        with safe_open(plan.file, "pt") as tensors:
            tensor = convert_layout(plan.name, tensors.get_tensor(plan.source_name), config)
        writer.write_tensor_data(quantize_tensor(tensor, plan))
