"""Write a folder with a causal language model (config, safetensors, tokenizer) as one GGUF file for
llama.cpp.

Tensor by tensor: no more than one weight is in memory at a time. What llama.cpp would compute
differently is refused with a
`UserError` whose words are for the person; a file that is written gives the answers of the folder.
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
    check,
    gemma_attention_size,
    rotation_factors,
)
from adapters.programs.gguf_tokenizer import add_tokenizer
from training.errors import UserError

# All that `gguf` can pack, K-quants not
QUANTISATIONS = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
)
PACKED = {Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0}
ROW_BLOCK = 32  # each of these packs 32 neighbours of a row


@dataclass(frozen=True)
class Part:
    """One tensor of the GGUF: where its numbers lie, and its shape and number format there."""

    file: Path
    source: str
    name: str
    shape: tuple[int, ...]
    kind: Kind


def export(folder: Path, target: Path, quantisation: str) -> None:
    """Write the model of `folder` to the file `target`; half a file is never left behind."""
    from transformers import AutoConfig, AutoTokenizer

    if quantisation not in QUANTISATIONS:
        raise UserError(
            f"{quantisation!r} is not a number format for GGUF here; choose one of "
            f"{', '.join(QUANTISATIONS)}."
        )
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder.name} is not a whole model: it has no config.json. Merge an adapter with "
            "its base first."
        )
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder.name} has no tokenizer.json; other tokenizers are not exported to GGUF."
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check(config)
    parts = list(find_parts(folder, config, Kind[quantisation.upper()]))
    rows = {part.name: part.shape[0] for part in parts}
    check_complete(rows.keys(), config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[FAMILIES[config.model_type].architecture])
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(
        FileType["ALL_F32" if quantisation == "f32" else f"MOSTLY_{quantisation.upper()}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, config)
    add_tokenizer(
        writer,
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        rows=rows["token_embd.weight"],
    )
    aside = target.with_name(f".{target.name}.partial")
    try:
        write(writer, aside, parts, config)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        writer.close()
    aside.replace(target)


def find_parts(folder: Path, config: Any, wanted: Kind) -> Iterator[Part]:
    """Every tensor under llama.cpp's name, in the order of the files; no numbers are read yet."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{folder.name} has no model*.safetensors; other weight files are not exported."
        )
    names = gguf.get_tensor_name_map(
        FAMILIES[config.model_type].architecture, config.num_hidden_layers
    )
    for file in files:
        with safe_open(file, "pt") as tensors:
            for source in tensors.keys():  # noqa: SIM118 - not a dict
                if is_spare(source, config):
                    continue
                old_gpt2 = config.model_type == "gpt2" and not source.startswith("transformer.")
                name = names.get_name(
                    f"transformer.{source}" if old_gpt2 else source, (".weight", ".bias")
                )
                numbers = tensors.get_slice(source)
                if name is None or numbers.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(
                        f"The tensor {source} ({numbers.get_dtype()}) has no place in a "
                        f"{config.model_type} GGUF."
                    )
                shape = tuple(numbers.get_shape())[:: -1 if is_turned(name, config) else 1]
                yield Part(file, source, name, shape, choose_kind(name, shape, wanted))


def check_complete(names: Collection[str], config: Any) -> None:
    """llama.cpp would say the same, but later and in words for programmers."""
    layers = Counter(name.split(".", 2)[2] for name in names if name.startswith("blk."))
    lost = [
        f"{name} of some layers"
        for name, found in layers.items()
        if found != config.num_hidden_layers
    ]
    whole = ["token_embd.weight", "output_norm.weight"] + ["output.weight"] * (
        not config.tie_word_embeddings
    )
    lost += [name for name in whole if name not in names]
    if lost or not layers:
        raise UserError(
            f"The weights are incomplete: {', '.join(lost) or 'all layers'} is missing."
        )


def is_spare(source: str, config: Any) -> bool:
    """A head that is the embedding over again, and buffers that old files carry."""
    tied_head = source == "lm_head.weight" and config.tie_word_embeddings
    return tied_head or source.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def is_turned(name: str, config: Any) -> bool:
    """GPT-2 alone keeps the matrices of its blocks as input x output."""
    return (
        config.model_type == "gpt2"
        and name.startswith("blk.")
        and name.endswith(".weight")
        and "_norm." not in name
    )


def choose_kind(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """Vectors and learned positions stay f32, as llama.cpp demands; rows that do not divide into
    blocks become f16.
    """
    if len(shape) < 2 or name == "position_embd.weight":
        return Kind.F32
    if wanted in PACKED and shape[-1] % ROW_BLOCK:
        return Kind.F16
    if wanted in PACKED and name in ("token_embd.weight", "output.weight"):
        return Kind.Q8_0  # both ends of the model suffer most from fewer bits
    return wanted


def arrange(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """The same function in the form that llama.cpp computes."""
    if is_turned(name, config):
        return tensor.T
    if FAMILIES[config.model_type].pairs and name.split(".")[-2] in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and "norm" in name:
        tensor = tensor.float() + 1.0  # Gemma keeps them around zero
        # llama.cpp divides attention by the root of a size, Gemma by that of a setting
        if "attn_q_norm" in name:
            tensor = tensor * math.sqrt(gemma_attention_size(config) / config.query_pre_attn_scalar)
    return tensor


def pack(tensor: torch.Tensor, part: Part) -> np.ndarray[Any, Any]:
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(part.kind, torch.float32)
    as_float = tensor.to(dtype)
    if not as_float.isfinite().all():
        raise UserError(
            f"The tensor {part.source} has numbers that are not finite or too large for "
            f"{part.kind.name}."
        )
    if part.kind is Kind.BF16:
        return as_float.contiguous().view(torch.int16).numpy()
    packed: np.ndarray[Any, Any] = gguf.quants.quantize(as_float.contiguous().numpy(), part.kind)
    return packed


def write(writer: gguf.GGUFWriter, path: Path, parts: list[Part], config: Any) -> None:
    """First the plan of all tensors, then their numbers, one tensor after another."""
    factors = rotation_factors(config)
    if factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes, Kind.F32
        )
    for part in parts:
        block, size = gguf.GGML_QUANT_SIZES[part.kind]
        writer.add_tensor_info(
            part.name,
            part.shape,
            np.dtype(np.float32),
            math.prod(part.shape) // block * size,
            part.kind,
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for part in parts:
        with safe_open(part.file, "pt") as tensors:
            tensor = arrange(part.name, tensors.get_tensor(part.source), config)
        writer.write_tensor_data(pack(tensor, part))
