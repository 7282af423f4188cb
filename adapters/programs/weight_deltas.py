"""What a version adds to a weight, from its files alone: thin factors for LoRA, a whole matrix for
the others.
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
class Update:
    """Of a weight of shape (out, in): `up` (out, rank) times `down` (rank, in); a whole matrix has
    no `down`.
    """

    up: Tensor
    down: Tensor | None = None

    def norm(self) -> float:
        """Frobenius: of factors sqrt(tr(B'B AA')), without making the product."""
        if self.down is None:
            return float(self.up.norm())
        inner = (self.up.T @ self.up) * (self.down @ self.down.T)
        return float(inner.sum().clamp_min(0).sqrt())

    def left(self, count: int) -> Tensor:
        """Its first left singular vectors, (out, at most `count`); those without weight are left
        out.
        """
        if self.down is None:
            torch.manual_seed(0)
            u, s, _ = torch.svd_lowrank(self.up, q=min(2 * count, *self.up.shape))
        else:
            q, r = torch.linalg.qr(self.up)
            inner, s, _ = torch.linalg.svd(r @ self.down, full_matrices=False)
            u = q @ inner
        kept = int((s > 1e-6 * s[0]).sum()) if len(s) and s[0] > 0 else 0
        return u[:, : min(count, kept)].contiguous()


Make = Callable[[Tensor], Update]  # from the base's weight


def updates_of(folder: Path, method: str) -> Iterator[tuple[str, Make]]:
    """(module, how its update comes from its weight). Nothing for methods that change no weight."""
    if method == "full":
        yield from whole_updates(folder)
    elif method in ("lora", "qlora", "ia3"):
        config = json.loads((folder / ADAPTER_FILES[1]).read_text())
        with safe_open(folder / ADAPTER_FILES[0], "pt") as file:
            opened: Any = file
            names = opened.keys()
            held = {name.removeprefix(PREFIX): opened.get_tensor(name).float() for name in names}
        yield from (ia3_updates if method == "ia3" else lora_updates)(held, config)


def whole_updates(folder: Path) -> Iterator[tuple[str, Make]]:
    file: Any = safe_open(folder / MODEL_FILE, "pt")
    names = file.keys()
    for name in names:
        if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
            yield name.removesuffix(".weight"), partial(trained_away, file, name)


def trained_away(file: Any, name: str, weight: Tensor) -> Update:
    return Update(file.get_tensor(name).float() - weight)


def lora_updates(held: dict[str, Tensor], config: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    """alpha / rank (rsLoRA: alpha / sqrt(rank)) times B A; DoRA rescales the rows of the sum to its
    magnitudes besides.
    """
    for name, first in held.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        second, rank = held[f"{module}.lora_B.weight"], first.shape[0]
        alpha = next(
            (a for key, a in (config.get("alpha_pattern") or {}).items() if module.endswith(key)),
            config["lora_alpha"],
        )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        # GPT-2 keeps its weights transposed.
        up, down = (first.T, second.T) if config.get("fan_in_fan_out") else (second, first)
        magnitude = held.get(f"{module}.lora_magnitude_vector")
        yield (
            module,
            partial(thin, scale * up, down)
            if magnitude is None
            else partial(dora, scale * up @ down, magnitude),
        )


def thin(up: Tensor, down: Tensor, _weight: Tensor) -> Update:
    return Update(up, down)


def dora(add: Tensor, magnitude: Tensor, weight: Tensor) -> Update:
    """m (W + BA) / ||W + BA|| by row, less W (Liu et al. 2024)."""
    both = weight + add
    return Update(magnitude[:, None] * both / both.norm(dim=1, keepdim=True) - weight)


def ia3_updates(held: dict[str, Tensor], _config: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    """A scale for each output (keys, values), or for each input (feed-forward): its shape tells
    which (Liu et al. 2022).
    """
    for name, scale in held.items():
        yield name.partition(".ia3_l")[0], partial(scaled, scale)


def scaled(scale: Tensor, weight: Tensor) -> Update:
    return Update(weight * scale - weight)
