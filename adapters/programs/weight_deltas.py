"""Read from a version's files what it adds to each weight: low-rank factors for LoRA, a full matrix
for other methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from training.engine.file_names import ADAPTER_FILES, MODEL_FILE

PREFIX = "base_model.model."


@dataclass(frozen=True)
class WeightDelta:
    """The change of a weight of shape (out, in): `up` (out, rank) times `down` (rank, in), or `up`
    alone as a full matrix.
    """

    up: Tensor
    down: Tensor | None = None

    def norm(self) -> float:
        """The Frobenius norm. For factors it is sqrt(tr(B'B AA')), without computing BA."""
        if self.down is None:
            return float(self.up.norm())
        inner = (self.up.T @ self.up) * (self.down @ self.down.T)
        return float(inner.sum().clamp_min(0).sqrt())

    def left_singular_vectors(self, count: int) -> Tensor:
        """The first left singular vectors with positive singular values: (out, at most `count`)."""
        if self.down is None:
            torch.manual_seed(0)
            u, s, _ = torch.svd_lowrank(self.up, q=min(2 * count, *self.up.shape))
        else:
            q, r = torch.linalg.qr(self.up)
            inner, s, _ = torch.linalg.svd(r @ self.down, full_matrices=False)
            u = q @ inner
        rank = int((s > 1e-6 * s[0]).sum()) if len(s) and s[0] > 0 else 0
        return u[:, : min(count, rank)].contiguous()


DeltaMaker = Callable[[Tensor], WeightDelta]  # takes the base model's weight


def load_deltas(folder: Path, method: str) -> Iterator[tuple[str, DeltaMaker]]:
    """(module, function from its base weight to its change). Empty for methods that change no
    weight.
    """
    if method == "full":
        yield from full_deltas(folder)
    elif method in ("lora", "qlora", "ia3"):
        config = json.loads((folder / ADAPTER_FILES[1]).read_text())
        with safe_open(folder / ADAPTER_FILES[0], "pt") as file:
            opened: Any = file
            names = opened.keys()
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name).float() for name in names}
        yield from (ia3_deltas if method == "ia3" else lora_deltas)(tensors, config)


def full_deltas(folder: Path) -> Iterator[tuple[str, DeltaMaker]]:
    file: Any = safe_open(folder / MODEL_FILE, "pt")
    names = file.keys()
    for name in names:
        if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
            yield name.removesuffix(".weight"), partial(subtract_base, file, name)


def subtract_base(file: Any, name: str, weight: Tensor) -> WeightDelta:
    return WeightDelta(file.get_tensor(name).float() - weight)


def lora_deltas(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> Iterator[tuple[str, DeltaMaker]]:
    """alpha / rank (rsLoRA: alpha / sqrt(rank)) times BA. DoRA also scales the rows of the sum to
    its magnitudes.
    """
    for name, lora_a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        lora_b, rank = tensors[f"{module}.lora_B.weight"], lora_a.shape[0]
        alpha = next(
            (a for key, a in (config.get("alpha_pattern") or {}).items() if module.endswith(key)),
            config["lora_alpha"],
        )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        # GPT-2 stores its weights transposed.
        up, down = (lora_a.T, lora_b.T) if config.get("fan_in_fan_out") else (lora_b, lora_a)
        magnitude = tensors.get(f"{module}.lora_magnitude_vector")
        yield (
            module,
            partial(make_thin_delta, scale * up, down)
            if magnitude is None
            else partial(make_dora_delta, scale * up @ down, magnitude),
        )


def make_thin_delta(up: Tensor, down: Tensor, _weight: Tensor) -> WeightDelta:
    return WeightDelta(up, down)


def make_dora_delta(addend: Tensor, magnitude: Tensor, weight: Tensor) -> WeightDelta:
    """m (W + BA) / ||W + BA|| - W, by row (Liu et al. 2024)."""
    combined = weight + addend
    return WeightDelta(magnitude[:, None] * combined / combined.norm(dim=1, keepdim=True) - weight)


def ia3_deltas(
    tensors: dict[str, Tensor], _config: dict[str, Any]
) -> Iterator[tuple[str, DeltaMaker]]:
    """A scale for each output (keys, values) or each input (feed-forward), depending on its shape
    (Liu et al. 2022).
    """
    for name, scale in tensors.items():
        yield name.partition(".ia3_l")[0], partial(make_scaled_delta, scale)


def make_scaled_delta(scale: Tensor, weight: Tensor) -> WeightDelta:
    return WeightDelta(weight * scale - weight)
