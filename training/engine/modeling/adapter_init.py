"""Adapter initializations that need more than the base model: EVA needs the data, LoftQ the
unquantized weights.

They run once, before the first step of a new run. A resumed run has its weights in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.engine.config import RunConfig
from training.engine.data.conversations import EncodedRow

# The directions of SmolLM2's inputs converge after about a hundred rows of smart_home
MAX_EVA_ROWS = 256
EVA_BATCH_SIZE = 4


def initialize_adapter(model: Any, config: RunConfig, rows: Sequence[EncodedRow]) -> None:
    """Initialize the adapter as in `init_lora_weights`, if PEFT has not done so when wrapping."""
    if config.init_lora_weights == "eva":
        init_eva(model, rows)
    elif config.init_lora_weights == "loftq":
        init_loftq(model, Path(config.model))


def init_eva(model: Any, rows: Sequence[EncodedRow]) -> None:
    """EVA (Paischer et al. 2024): initialize A with the principal directions of each layer's
    inputs, computed by PEFT's incremental SVD.
    """
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    batches = []
    # If there are fewer rows than EVA_BATCH_SIZE, they form one smaller batch
    for start in range(
        0, max(1, min(len(rows), MAX_EVA_ROWS) - EVA_BATCH_SIZE + 1), EVA_BATCH_SIZE
    ):
        chunk = rows[start : start + EVA_BATCH_SIZE]
        longest = max(len(row) for row in chunk)
        ids, mask = (
            torch.zeros(len(chunk), longest, dtype=torch.long),
            torch.zeros(len(chunk), longest, dtype=torch.long),
        )
        for index, row in enumerate(chunk):
            ids[index, : len(row)] = torch.from_numpy(row.ids)
            mask[index, : len(row)] = 1
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    # So that loading the adapter does not need the data
    model.active_peft_config.init_lora_weights, model.active_peft_config.eva_config = (
        True,
        None,
    )


def init_loftq(model: Any, folder: Path) -> None:
    """LoftQ (Li et al. 2023, algorithm 1 with one step): initialize B A with the best rank-r
    approximation of each weight's NF4 quantization error.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit
    from transformers.pytorch_utils import Conv1D

    from training.engine.modeling.model import load_base

    original_modules = dict(load_base(folder, torch.float32, torch.device("cpu")).named_modules())
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        original = original_modules[name]
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        quantized = layer.get_base_layer().weight
        residual = (
            weight.detach().to(quantized.device)
            - dequantize_4bit(quantized.data, quantized.quant_state).float()
        )
        rank = layer.r["default"]
        left, singular_values, right = torch.linalg.svd(residual, full_matrices=False)
        root = singular_values[:rank].sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root / layer.scaling["default"])
