"""Creates the optimizer of a run, and saves and loads its state as tensors. 8-bit and paged AdamW
come from bitsandbytes (Dettmers et al. 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.engine.config import RunConfig


def make_optimizer(model: Any, config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """Create AdamW for the trainable parameters. With LoRA+ (Hayou et al. 2024), the learning rate
    of the B matrices is `loraplus_lr_ratio` times as high.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast_parameters = [
        p for name, p in trained if config.loraplus_lr_ratio != 1 and ".lora_B." in name
    ]
    fast_ids = {id(p) for p in fast_parameters}
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in trained if id(p) not in fast_ids], "rate": 1.0}
    ]
    if fast_parameters:
        groups.append({"params": fast_parameters, "rate": config.loraplus_lr_ratio})
    kind = config.resolve_optimizer(device.type)
    if kind == "adamw_torch":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=True)
    import bitsandbytes

    optimizer_class = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[kind]
    optimizer: torch.optim.Optimizer = optimizer_class(
        groups, lr=0.0, weight_decay=config.weight_decay
    )
    return optimizer


def get_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def get_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state as tensors named by the parameter's index (`3.exp_avg`). The step counts of
    bitsandbytes are ints and become scalar tensors.
    """
    return {
        f"{index}.{key}": value.detach().contiguous()
        if isinstance(value, Tensor)
        else torch.tensor(value)
        for index, parameter in enumerate(get_parameters(optimizer))
        for key, value in optimizer.state[parameter].items()
        if not key.startswith("qmap")  # bitsandbytes' table of 8-bit values, the same for all
    }


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state that `get_state` returned."""
    state_by_index: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state_by_index.setdefault(int(index), {})[key] = value
    is_bitsandbytes = type(optimizer).__module__.startswith("bitsandbytes")
    if is_bitsandbytes:
        optimizer.check_overrides()  # type: ignore[attr-defined]
    positions = [
        (g, p, parameter)
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
    ]
    for number, (g, p, parameter) in enumerate(positions):
        saved = state_by_index.get(number, {})
        if not is_bitsandbytes:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in saved.items()
            }
        elif saved:
            # bitsandbytes allocates its (paged) state itself, so the values are copied into it
            group = optimizer.param_groups[g]
            optimizer.init_state(group, parameter, g, p)  # type: ignore[attr-defined]
            state = optimizer.state[parameter]
            for key, value in saved.items():
                if isinstance(state[key], Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value.item()
    if is_bitsandbytes:
        optimizer.initialized = True  # type: ignore[attr-defined]
