"""Read and check the metadata of a model folder, without torch and without the ORM.

The folder is untrusted: JSON and safetensors headers are read with size limits, and no code from it
is ever run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.catalog.safetensors_header import InvalidHeader, TensorInfo, read_header
from training.errors import UserError
from training.formatting import format_binary_bytes
from training.text_input import InvalidInput, check_value, parse_json

# tokenizer.json is not read here; Gemma's, the largest known, has 33 million characters.
MAX_JSON_BYTES = 32 * 2**20
MAX_TEMPLATE_CHARS = 100_000  # characters
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Config keys that can name code to run (CVE-2026-4372, CVE-2026-5241).
CODE_KEYS = (
    "auto_map",
    "_attn_implementation_internal",
    "_attn_implementation",
    "trust_remote_code",
    "custom_pipelines",
)


# Modules with two-dimensional weights that are embeddings or the output layer.
NON_LINEAR_MODULES = (
    "embed_tokens",
    "wte",
    "wpe",
    "lm_head",
    "embed_in",
    "embed_out",
    "word_embeddings",
    "embed_positions",
)


class UnsupportedModel(UserError):
    """The folder has no base model that SnapML can train safely."""


def read_model_metadata(folder: Path) -> dict[str, Any]:
    """Architecture, size and chat template of the causal language model in `folder`.

    Raises:
        UnsupportedModel: a file is missing or invalid.
    """
    try:
        metadata = collect_metadata(folder)
        check_value(metadata, folder.name)
    except UnsupportedModel:
        raise
    except InvalidInput as error:
        raise UnsupportedModel(f"{folder.name}: {error.message}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise UnsupportedModel(
            f"{folder.name} cannot be read as a model ({type(error).__name__}: {error}).",
            code="unreadable",
        ) from error
    return metadata


def collect_metadata(folder: Path) -> dict[str, Any]:
    check_no_outside_links(folder)
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder.name} is an adapter, not a base model. Import it on the Adapters page."
        )
    config = read_json(folder / "config.json")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            check_no_code(read_json(folder / name), name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES]
        reason = (
            f"only {pickled[0]}, which is pickled and could run code" if pickled else "no weights"
        )
        raise UnsupportedModel(
            f"{folder.name} has {reason}. SnapML loads only safetensors.",
            code="pickled_weights" if pickled else "no_weights",
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UnsupportedModel(
            f"{folder.name} has no tokenizer.json. Save the tokenizer in the model's folder."
        )
    architectures = config.get("architectures") or ["model without an architecture"]
    if not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModel(
            f"{folder.name} is a {architectures[0]}. SnapML trains only causal language models "
            "(…ForCausalLM).",
            code="not_causal_lm",
        )
    parameters, dtypes = count_parameters(weights)
    text_config = config.get("text_config") or config
    template = read_chat_template(folder)
    return {
        "architecture": architectures[0],
        "parameters": parameters,
        "layers": text_config.get("num_hidden_layers") or text_config.get("n_layer"),
        "hidden_size": text_config.get("hidden_size")
        or text_config.get("n_embd")
        or text_config.get("d_model")
        or text_config.get("n_embed"),
        "context_length": text_config.get("max_position_embeddings")
        or text_config.get("n_positions"),
        "vocabulary": text_config.get("vocab_size"),
        "dtype": " + ".join(sorted(dtypes)),
        "bytes": sum(path.stat().st_size for path in weights),
        "chat_template": template,
        "license": read_license(folder),
    }


def check_no_outside_links(folder: Path) -> None:
    """Links out of the folder could expose other files of the server.

    Raises:
        UnsupportedModel: the folder has such a link.
    """
    root = folder.resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise UnsupportedModel(
                f"{path.name} is a link out of {folder.name}. Replace it by a copy of the file."
            )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnsupportedModel(f"{path.parent.name} has no {path.name}.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsupportedModel(f"{path.name} is larger than {format_binary_bytes(MAX_JSON_BYTES)}.")
    try:
        value = parse_json(path.read_bytes(), path.name, allow_any_number=True)
    except InvalidInput as error:
        raise UnsupportedModel(f"{path.name}: {error.message}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path.name} must be a JSON object.")
    return value


def check_no_code(value: Any, file_name: str) -> None:
    """Look for keys that name code, at any depth.

    Raises:
        UnsupportedModel: there is such a key.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in CODE_KEYS and inner not in (None, False, "sdpa", "eager"):
                raise UnsupportedModel(
                    f"{file_name} has the key `{key}`, which can run code from the model's folder. "
                    "SnapML does not load such models.",
                    code="runs_code",
                )
            check_no_code(inner, file_name)
    elif isinstance(value, list):
        for inner in value:
            check_no_code(inner, file_name)


def count_parameters(files: list[Path]) -> tuple[int, set[str]]:
    """The number of parameters and their dtypes, from the headers alone.

    Raises:
        UnsupportedModel: a header is invalid (see `read_header`).
    """
    tensors = [tensor for path in files for tensor in read_tensors(path).values()]
    return sum(math.prod(tensor.shape) for tensor in tensors), {tensor.dtype for tensor in tensors}


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except InvalidHeader as error:
        raise UnsupportedModel(error.message, code=error.code) from error


def read_chat_template(folder: Path) -> str:
    """The model's chat template. If empty, the engine uses its default."""
    if (folder / "chat_template.jinja").is_file():
        with (folder / "chat_template.jinja").open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_CHARS)
    if not (folder / "tokenizer_config.json").is_file():
        return ""
    template = read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    return template[:MAX_TEMPLATE_CHARS] if isinstance(template, str) else ""


def read_license(folder: Path) -> str:
    """The license in the header of the model card (`license: apache-2.0`), or an empty string."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    with readme.open(encoding="utf-8", errors="replace") as file:
        for line in file.readlines(20_000)[:60]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()[:80]
    return ""


@lru_cache(maxsize=64)
def list_linear_layers(folder: Path) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Name and shape of every linear layer except the output layer: PEFT's `all-linear`."""
    layers = []
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_tensors(path).items():
            if not name.endswith(".weight") or len(tensor.shape) != 2:
                continue
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in NON_LINEAR_MODULES:
                layers.append((module, (tensor.shape[0], tensor.shape[1])))
    return tuple(layers)
