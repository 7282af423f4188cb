"""LoRA for a batch whose rows go through different adapters, as two thin products at each layer,
whatever their number.

PEFT computes each adapter's rows apart: for SmolLM2-135M eight adapters in a batch of eight rows
gave 29 tokens/s where the base alone gives 124 (benchmarks/inference.py). Here the adapters of the
batch stand in one A (sum of ranks, in) and one B (out, sum of ranks), and a row's products with the
others' ranks are multiplied by zero. On a CPU they are fp32: there a thin product in bf16 takes 28
microseconds and in fp32 7, because oneDNN lays bf16 weights out anew each time.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional

from training.errors import UserError

# PEFT's LoRA layers whose product is x A' B'; GPT-2's Conv1D is a Linear there
SUPPORTED_LAYERS = (
    "Linear",
    "Embedding",
    "Linear4bit",
)
AdapterNames = tuple[str | None, ...]


class RowAdapters:
    """Whose each row of the next forwards is: an adapter's name, or None for the base; `names`
    None: PEFT's own way.
    """

    def __init__(self) -> None:
        self.names: AdapterNames | None = None

    def set_names(self, names: AdapterNames | None) -> None:
        # An equal tuple stays the same object, which tells the layers that nothing has changed
        if names != self.names:
            self.names = names


class LayerForward:
    """One LoRA layer's forward for the rows that `rows` names."""

    def __init__(self, layer: Any, row_adapters: RowAdapters) -> None:
        # A circle would keep a base that has left in memory
        self._layer, self.row_adapters = (
            weakref.ref(layer),
            row_adapters,
        )
        self.stacked_names: AdapterNames | None = None
        self.lora_a: Tensor | None = None
        self.lora_b: Tensor | None = None
        self.scales: Tensor | float = 1.0

    @property
    def layer(self) -> Any:
        return self._layer()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.row_adapters.names is None:
            output: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return output
        if self.layer.lora_embedding_A:
            names = ["__base__" if name is None else name for name in self.row_adapters.names]
            embedded: Tensor = type(self.layer).forward(
                self.layer, x, *args, adapter_names=names, **kwargs
            )
            return embedded
        y: Tensor = self.layer.base_layer(x, *args, **kwargs)
        if self.row_adapters.names is not self.stacked_names:
            self.stack_adapters(self.row_adapters.names, x.dtype if x.is_cuda else torch.float32)
        if self.lora_a is None or self.lora_b is None:
            return y
        inner = functional.linear(x.to(self.lora_a.dtype), self.lora_a).mul_(self.scales_for(x))
        return y.add_(functional.linear(inner, self.lora_b))

    def scales_for(self, x: Tensor) -> Tensor | float:
        """Of x's rows: (rows, places, in), or (rows, in) in models that flatten a token a row
        (OPT).

        Raises:
            UserError: the layer sees tokens without rows (experts of a mixture), so nobody can say
                whose they are.
        """
        if isinstance(self.scales, float):
            return self.scales
        if len(x) != len(self.scales):
            raise UserError(
                "This model's layers do not tell rows apart; ask its adapters one at a time."
            )
        return self.scales.view(len(self.scales), *[1] * (x.dim() - 2), -1)

    def stack_adapters(self, names: AdapterNames, dtype: torch.dtype) -> None:
        """Put the adapters of these rows side by side, as far as this layer has them."""
        layer = self.layer
        present_names = [name for name in dict.fromkeys(names) if name in layer.lora_A]
        self.stacked_names, self.lora_a, self.lora_b = names, None, None
        if not present_names:
            return
        self.lora_a = concat_weights(
            [layer.lora_A[name].weight.to(dtype) for name in present_names], 0
        )
        self.lora_b = concat_weights(
            [layer.lora_B[name].weight.to(dtype) for name in present_names], 1
        )
        if len(set(names)) == 1:
            self.scales = float(layer.scaling[present_names[0]])
            return
        ranks = torch.tensor([len(layer.lora_A[name].weight) for name in present_names])
        table = [
            [layer.scaling[name] if name == row_name else 0.0 for name in present_names]
            for row_name in names
        ]
        self.scales = (
            torch.tensor(table, dtype=dtype).repeat_interleave(ranks, 1).to(self.lora_a.device)
        )


def concat_weights(weights: list[Tensor], dim: int) -> Tensor:
    return torch.cat(weights, dim) if len(weights) > 1 else weights[0]


def patch_lora_layers(model: Any, row_adapters: RowAdapters) -> bool:
    """Let every LoRA layer of a PEFT model ask `rows`; False, and nothing is changed, if some are
    of another kind (convolutions, experts' parameters, which PEFT may choose by itself).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if any(type(layer).__name__ not in SUPPORTED_LAYERS for layer in layers):
        return False
    for layer in layers:
        layer.forward = LayerForward(layer, row_adapters)
    return True
