"""What the files of a model folder say of it, read without torch, and what makes a folder unfit. It
knows no ORM.

The folder is untrusted: JSON and safetensors headers are read with size limits, and nothing in it
is ever run.
"""

from __future__ import annotations

import json
import math
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.errors import UserError

MAX_JSON_BYTES = (
    32 * 2**20
)  # Gemma's tokenizer.json, the largest seen, has 33 million characters and is not read here
MAX_TEMPLATE = 100_000  # characters
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Keys with which a config could name code to run (CVE-2026-4372, CVE-2026-5241).
CODE_KEYS = (
    "auto_map",
    "_attn_implementation_internal",
    "_attn_implementation",
    "trust_remote_code",
    "custom_pipelines",
)


# Two-dimensional weights that are embeddings or the output layer.
NO_LINEAR = (
    "embed_tokens",
    "wte",
    "wpe",
    "lm_head",
    "embed_in",
    "embed_out",
    "word_embeddings",
    "embed_positions",
)


class UnfitModel(UserError):
    """The folder is not a base model that SnapML can train safely."""


def read_card(folder: Path) -> dict[str, Any]:
    """Architecture, size and template of the causal language model in `folder`.

    Raises:
        UnfitModel: says which file is missing or wrong.
    """
    try:
        return card_of(folder)
    except UnfitModel:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise UnfitModel(
            f"{folder.name} cannot be read as a model ({type(error).__name__}: {error})."
        ) from error


def card_of(folder: Path) -> dict[str, Any]:
    refuse_links(folder)
    if (folder / "adapter_config.json").exists():
        raise UnfitModel(f"{folder.name} is an adapter, not a base model.")
    config = read_json(folder / "config.json")
    for name in CONFIGS:
        if (folder / name).is_file():
            refuse_code(read_json(folder / name), name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        found = [path.name for path in folder.iterdir() if path.suffix in PICKLED]
        why = f"only {found[0]}, which is pickled and could run code" if found else "no weights"
        raise UnfitModel(
            f"{folder.name} has {why}. SnapML loads safetensors only.",
            code="pickled_weights" if found else "no_weights",
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UnfitModel(
            f"{folder.name} has no tokenizer.json. Save the tokenizer beside the weights."
        )
    architectures = config.get("architectures") or ["model without an architecture"]
    if not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise UnfitModel(
            f"{folder.name} is a {architectures[0]}; SnapML trains causal language models "
            "(…ForCausalLM).",
            code="not_causal_lm",
        )
    parameters, dtypes = count_parameters(weights)
    text = config.get("text_config") or config
    template = chat_template(folder)
    return {
        "architecture": architectures[0],
        "parameters": parameters,
        "layers": text.get("num_hidden_layers") or text.get("n_layer"),
        "hidden_size": text.get("hidden_size")
        or text.get("n_embd")
        or text.get("d_model")
        or text.get("n_embed"),
        "context_length": text.get("max_position_embeddings") or text.get("n_positions"),
        "vocabulary": text.get("vocab_size"),
        "dtype": " + ".join(sorted(dtypes)),
        "bytes": sum(path.stat().st_size for path in weights),
        "chat_template": template,
        "licence": licence(folder),
    }


def refuse_links(folder: Path) -> None:
    """A link out of the folder would show other files of the server on the card.

    Raises:
        UnfitModel: names the link.
    """
    root = folder.resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise UnfitModel(f"{path.name} is a link out of {folder.name}; copy the file instead.")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnfitModel(f"There is no {path.name} in {path.parent.name}.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnfitModel(f"{path.name} is larger than {MAX_JSON_BYTES // 2**20} MiB.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnfitModel(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnfitModel(f"{path.name} must be a JSON object.")
    return value


def refuse_code(value: Any, where: str) -> None:
    """Refuse keys that name code, at any depth.

    Raises:
        UnfitModel: with the key.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in CODE_KEYS and inner not in (None, False, "sdpa", "eager"):
                raise UnfitModel(
                    f"{where} has `{key}`, which can run code from the model's folder. SnapML "
                    "never does that.",
                    code="runs_code",
                )
            refuse_code(inner, where)
    elif isinstance(value, list):
        for inner in value:
            refuse_code(inner, where)


def count_parameters(files: list[Path]) -> tuple[int, set[str]]:
    """Parameters and dtypes from the headers alone.

    Raises:
        UnfitModel: a header is broken, or its offsets do not lie inside the file.
    """
    total, dtypes = 0, set()
    for path in files:
        for name, tensor in read_header(path).items():
            if name == "__metadata__":
                continue
            shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
            if not all(type(size) is int and size >= 0 for size in shape):
                raise UnfitModel(f"{path.name}: tensor {name} has the shape {shape}.")
            count = math.prod(shape)
            if end - begin != count * DTYPE_BYTES.get(tensor["dtype"], -1):
                raise UnfitModel(
                    f"{path.name}: tensor {name} does not have the size that its shape and dtype "
                    "say."
                )
            total += count
            dtypes.add(tensor["dtype"])
    return total, dtypes


def read_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UnfitModel(
                f"{path.name} is not a safetensors file: its header says {length} bytes, the file "
                f"has {size}.",
                code="broken_header",
            )
        try:
            header = json.loads(file.read(length))
            spans = sorted(
                tuple(t["data_offsets"]) for n, t in header.items() if n != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnfitModel(f"{path.name} has a broken safetensors header.") from error
    edge = 0
    for begin, end in spans:
        if begin != edge or end < begin or end > size - 8 - length:
            raise UnfitModel(
                f"{path.name}: tensors overlap, leave gaps or reach past the end of the file.",
                code="bad_offsets",
            )
        edge = end
    return dict(header)


def chat_template(folder: Path) -> str:
    """The model's own template, or an empty string: then the engine's default is used."""
    if (folder / "chat_template.jinja").is_file():
        with (folder / "chat_template.jinja").open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE)
    if not (folder / "tokenizer_config.json").is_file():
        return ""
    template = read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    return template[:MAX_TEMPLATE] if isinstance(template, str) else ""


def licence(folder: Path) -> str:
    """The licence that the model card's first lines (`license: apache-2.0`) name, or an empty
    string.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    with readme.open(encoding="utf-8", errors="replace") as file:
        for line in file.readlines(20_000)[:60]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()[:80]
    return ""


@lru_cache(maxsize=64)
def linear_layers(folder: Path) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Name and shape of every linear layer but the output, from the safetensors headers: what
    `all-linear` means to PEFT.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path).items():
            if name == "__metadata__" or not name.endswith(".weight") or len(tensor["shape"]) != 2:
                continue
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in NO_LINEAR:
                found.append((module, (tensor["shape"][0], tensor["shape"][1])))
    return tuple(found)
