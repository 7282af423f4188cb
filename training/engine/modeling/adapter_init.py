"""Where an update starts, for starts that need more than the base: EVA looks at the data, LoftQ at
the full weights.

Called once, before the first step of a fresh run; a run that resumes has its weights in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.engine.config import RunConfig
from training.engine.data.conversations import EncodedRow

# at most; the directions of SmolLM2's inputs settle after about a hundred rows of smart_home
EVA_ROWS = 256
EVA_BATCH = 4


def begin(model: Any, config: RunConfig, rows: Sequence[EncodedRow]) -> None:
    """Move the adapter to where `init_lora_weights` says, if wrapping has not done so already."""
    if config.init_lora_weights == "eva":
        start_from_data(model, rows)
    elif config.init_lora_weights == "loftq":
        start_from_loss_of_bits(model, Path(config.model))


def start_from_data(model: Any, rows: Sequence[EncodedRow]) -> None:
    """EVA (Paischer et al. 2024): A starts as the main directions of each layer's inputs, found by
    PEFT's incremental SVD.
    """
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    batches = []
    # Fewer rows make one smaller batch
    for at in range(0, max(1, min(len(rows), EVA_ROWS) - EVA_BATCH + 1), EVA_BATCH):
        part = rows[at : at + EVA_BATCH]
        longest = max(len(row) for row in part)
        ids, mask = (
            torch.zeros(len(part), longest, dtype=torch.long),
            torch.zeros(len(part), longest, dtype=torch.long),
        )
        for place, row in enumerate(part):
            ids[place, : len(row)] = torch.from_numpy(row.ids)
            mask[place, : len(row)] = 1
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    # Loading must not look for data
    model.active_peft_config.init_lora_weights, model.active_peft_config.eva_config = (
        True,
        None,
    )


def start_from_loss_of_bits(model: Any, folder: Path) -> None:
    """LoftQ (Li et al. 2023, algorithm 1 with one step): B A starts as the best rank-r part of what
    NF4 lost of each weight.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit
    from transformers.pytorch_utils import Conv1D

    from training.engine.modeling.model import load_base

    whole = dict(load_base(folder, torch.float32, torch.device("cpu")).named_modules())
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        original = whole[name]
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        held = layer.get_base_layer().weight
        lost = (
            weight.detach().to(held.device) - dequantize_4bit(held.data, held.quant_state).float()
        )
        rank = layer.r["default"]
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        root = sizes[:rank].sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root / layer.scaling["default"])
