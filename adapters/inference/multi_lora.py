"""LoRA for a batch whose rows use different adapters: two thin matrix products per layer, however
many adapters there are.

PEFT computes the rows of each adapter separately: for SmolLM2-135M, a batch of eight rows with
eight adapters made 29 tokens/s where the base model alone makes 124 (benchmarks/inference.py). Here
the adapters of a batch are concatenated into one A (sum of ranks, in) and one B (out, sum of
ranks), and a row's products with the ranks of other adapters are multiplied by zero. On a CPU A and
B are fp32: a thin product takes 28 microseconds in bf16 and 7 in fp32, because oneDNN repacks bf16
weights on every call.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional

from training.errors import UserError

# PEFT's LoRA layers that compute x A' B'. GPT-2's Conv1D is a Linear there.
SUPPORTED_LAYERS = ("Linear", "Embedding", "Linear4bit")
AdapterNames = tuple[str | None, ...]


class RowAdapters:
    """The adapter of each batch row for the next forward passes; None is the base model.

    One object is shared by all layers of a model. Where `names` is None, the layers do what PEFT
    does.
    """

    def __init__(self) -> None:
        self.names: AdapterNames | None = None

    def set_names(self, names: AdapterNames | None) -> None:
        # Keep the same object for equal names: layers compare by identity to see a change.
        if names != self.names:
            self.names = names


class LayerForward:
    """The forward method of one LoRA layer, which gives each row the adapter of `row_adapters`."""

    def __init__(self, layer: Any, row_adapters: RowAdapters) -> None:
        # A strong reference would be a cycle that keeps an evicted model in memory.
        self._layer, self.row_adapters = weakref.ref(layer), row_adapters
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
        """The scale of each row and rank, to multiply with A x. x is (rows, tokens, in), or
        (rows, in) in models that flatten it (OPT), with one token per row.

        Raises:
            UserError: the layer gets tokens without their rows (mixture of experts), so their
                adapter is unknown.
        """
        if isinstance(self.scales, float):
            return self.scales
        if len(x) != len(self.scales):
            raise UserError(
                "This model cannot mix adapters in a batch; send requests to one adapter at a time."
            )
        return self.scales.view(len(self.scales), *[1] * (x.dim() - 2), -1)

    def stack_adapters(self, names: AdapterNames, dtype: torch.dtype) -> None:
        """Concatenate the A and B of these adapters, of those that have this layer."""
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
    """Make every LoRA layer of a PEFT model follow `row_adapters`.

    Returns False and changes nothing if a layer is of another kind (convolutions, parameters of
    experts).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if any(type(layer).__name__ not in SUPPORTED_LAYERS for layer in layers):
        return False
    for layer in layers:
        layer.forward = LayerForward(layer, row_adapters)
    return True
