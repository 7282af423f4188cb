"""What a run learned, written and read: an adapter as PEFT saves it, or the whole model.
Safetensors and JSON, nothing else.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import training.engine.modeling.library_patches  # noqa: F401 before any adapter is loaded or asked
from training.engine.config import RunConfig
from training.engine.file_names import ADAPTER_FILES, MODEL_FILE

BASE_MUTATING_INITS = (
    "pissa",
    "pissa_niter_4",
    "olora",
)  # starts that take a part out of the base's weights
RAW_PREFIX = "raw."


def copy_initial_state(model: Any, config: RunConfig) -> dict[str, Tensor] | None:
    """A copy of the adapter before its first step, if its start changed the base: saving it as
    plain LoRA needs that.
    """
    if config.init_lora_weights not in BASE_MUTATING_INITS:
        return None
    return {
        name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()
    }


def write_weights(model: Any, folder: Path, initial_state: dict[str, Tensor] | None = None) -> None:
    """An adapter loadable with plain `PeftModel.from_pretrained`, or a model loadable with plain
    `from_pretrained`.
    """
    if initial_state is not None:
        write_as_plain_lora(model, folder, initial_state)
    elif isinstance(model, PeftModel):
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        # One file, so that one hash names the weights
        model.save_pretrained(folder, max_shard_size="1000GB")


def write_as_plain_lora(model: Any, folder: Path, initial_state: dict[str, Tensor]) -> None:
    """PiSSA and OLoRA as plain LoRA of twice the rank on the untouched base: B A - B0 A0 = [B, -B0]
    [A; A0].

    Saved as it is, `pissa_niter` would draw another random SVD at loading (logits off by 0.59).
    """
    tensors = {}
    for name, value in get_peft_model_state_dict(model).items():
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
    """The trained parameters by position, where the saved form is not the trained one: only these
    bring a run back to the bit.
    """
    if config.init_lora_weights not in BASE_MUTATING_INITS and not config.prefix_projection:
        return {}
    trained = [p for p in model.parameters() if p.requires_grad]
    return {f"{RAW_PREFIX}{index}": p.detach().contiguous() for index, p in enumerate(trained)}


def read_weights(model: Any, folder: Path, raw_tensors: dict[str, Tensor]) -> None:
    """Put back what `write_weights` and `get_raw_weights` told of a model that was wrapped in the same
    way.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if raw_tensors:
        with torch.no_grad():
            for index, parameter in enumerate(trained):
                parameter.copy_(raw_tensors[f"{RAW_PREFIX}{index}"])
    elif isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILES[0]))
    else:
        # Tied weights are in the file once
        model.load_state_dict(load_file(folder / MODEL_FILE), strict=False)
        model.tie_weights()


def check_parameter_names(model: Any, folder: Path) -> None:
    """Raises KeyError: the folder's adapter has parameters that the model has not, or lacks some.
    PEFT would pass over both.
    """
    if isinstance(model, PeftModel):
        unmatched = set(load_file(folder / ADAPTER_FILES[0])) ^ set(
            get_peft_model_state_dict(model)
        )
        if unmatched:
            raise KeyError(
                f"{len(unmatched)} parameters stand on one side only, such as {min(unmatched)}"
            )


def load_adapter(base: Any, folder: Path, name: str) -> Any:
    """A PEFT model of `base` with the adapter in `folder`, in eval mode."""
    return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
