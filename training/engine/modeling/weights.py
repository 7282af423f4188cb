"""Saves and loads trained weights: an adapter in PEFT's format, or the full model. The files are
safetensors and JSON only.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import training.engine.modeling.library_patches  # noqa: F401 before any adapter is loaded
from training.engine.config import RunConfig
from training.engine.file_names import ADAPTER_FILES, MODEL_FILE
from training.engine.settings import BASE_CHANGING_INITS

RAW_PREFIX = "raw."


def get_adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapter's own weights by their names in the file. PEFT would add the whole embeddings and
    output head to an adapter that targets one of them.
    """
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def copy_initial_state(model: Any, config: RunConfig) -> dict[str, Tensor] | None:
    """Return a copy of the adapter before the first step if its initialization changed the base:
    it is needed to save the adapter as plain LoRA.
    """
    if config.init_lora_weights not in BASE_CHANGING_INITS:
        return None
    return {name: value.detach().clone() for name, value in get_adapter_weights(model).items()}


def write_weights(model: Any, folder: Path, initial_state: dict[str, Tensor] | None = None) -> None:
    """Save an adapter that plain `PeftModel.from_pretrained` can load, or a model that plain
    `from_pretrained` can load.
    """
    if initial_state is not None:
        write_as_plain_lora(model, folder, initial_state)
    elif isinstance(model, PeftModel):
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        # A single file, so that one digest identifies the weights
        model.save_pretrained(folder, max_shard_size="1000GB")


def write_as_plain_lora(model: Any, folder: Path, initial_state: dict[str, Tensor]) -> None:
    """Save PiSSA and OLoRA as plain LoRA of twice the rank on the original base: B A - B0 A0 =
    [B, -B0] [A; A0].

    Otherwise, `pissa_niter` would compute another random SVD at loading (logits off by 0.59).
    """
    tensors = {}
    for name, value in get_adapter_weights(model).items():
        initial = initial_state[name].to(value.device)
        tensors[name] = (
            torch.cat([value, initial], 0) if "lora_A" in name else torch.cat([value, -initial], 1)
        )
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / ADAPTER_FILES[0],
        metadata={"format": "pt"},
    )
    config = copy.deepcopy(model.active_peft_config)
    config.r, config.lora_alpha, config.init_lora_weights, config.inference_mode = (
        2 * config.r,
        2 * config.lora_alpha,
        True,
        True,
    )
    config.save_pretrained(folder)


def get_raw_weights(model: Any, config: RunConfig) -> dict[str, Tensor]:
    """Return the trained parameters by index if they differ from the saved form. Resuming needs
    them to be bit-identical.
    """
    if config.init_lora_weights not in BASE_CHANGING_INITS and not config.prefix_projection:
        return {}
    trained = [p for p in model.parameters() if p.requires_grad]
    return {f"{RAW_PREFIX}{index}": p.detach().contiguous() for index, p in enumerate(trained)}


def read_weights(model: Any, folder: Path, raw_tensors: dict[str, Tensor]) -> None:
    """Load the output of `write_weights` and `get_raw_weights` into a model that is wrapped in the
    same way.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if raw_tensors:
        with torch.no_grad():
            for index, parameter in enumerate(trained):
                parameter.copy_(raw_tensors[f"{RAW_PREFIX}{index}"])
    elif isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILES[0]))
    else:
        # The file has tied weights only once
        model.load_state_dict(load_file(folder / MODEL_FILE), strict=False)
        model.tie_weights()


def check_parameter_names(model: Any, folder: Path) -> None:
    """Raises KeyError: the parameters of the folder's adapter and of the model differ in their
    names, which PEFT ignores.
    """
    if isinstance(model, PeftModel):
        unmatched = set(load_file(folder / ADAPTER_FILES[0])) ^ set(get_adapter_weights(model))
        if unmatched:
            raise KeyError(
                f"{len(unmatched)} parameters exist on one side only, such as {min(unmatched)}"
            )


def load_adapter(base: Any, folder: Path, name: str) -> Any:
    """Return a PEFT model of `base` with the adapter in `folder`, in eval mode."""
    return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
