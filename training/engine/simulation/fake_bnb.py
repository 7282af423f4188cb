"""Stand-ins for bitsandbytes' 4-bit layers and 8-bit optimizer states that need the same memory but
hold no data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NF4_BLOCK, ABSMAX_BLOCK = 64, 256
BLOCK_8BIT, MIN_8BIT_SIZE = 256, 4096


def count_nf4_overhead(numel: int) -> int:
    """Bytes besides the packed 4-bit weights: the code, the 8-bit block scales, and the scales,
    code and offset of those (double quantization).
    """
    blocks = -(-numel // NF4_BLOCK)
    return 64 + blocks + 4 * -(-blocks // ABSMAX_BLOCK) + 1024 + 4


def count_8bit_workspace_bytes(parameter: Tensor) -> int:
    """Temporary bytes of bitsandbytes' optimizer step on a CPU (bitsandbytes/backends/cpu/ops.py).

    It holds fp32 copies of both states, the gradient, twice the root of the second moment, and the
    weight if it is not fp32. Small tensors keep 32-bit states and need no copies.
    """
    if parameter.numel() < MIN_8BIT_SIZE:
        return 0
    return parameter.numel() * 4 * (5 if parameter.dtype == torch.float32 else 6)


class _MatMul4Bit(torch.autograd.Function):
    """bitsandbytes' product with a 4-bit weight. Forward and backward each dequantize the weight
    temporarily.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ torch.empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None


def replace_with_4bit_layers(model: Any, dtype: torch.dtype) -> None:
    """Replace every linear layer except the output by a layer with the size and behavior of
    bitsandbytes' Linear4bit.
    """
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D

    # PEFT checks for this class, so the stand-in inherits from it
    class FakeLinear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features, self.compute_dtype = inputs, outputs, dtype
            self.weight = nn.Parameter(
                torch.empty(-(-inputs * outputs // 2), 1, dtype=torch.uint8), requires_grad=False
            )
            self.weight.compress_statistics = True  # type: ignore[attr-defined]
            self.weight.quant_type = "nf4"  # type: ignore[attr-defined]
            self.register_buffer(
                "extra", torch.empty(count_nf4_overhead(inputs * outputs), dtype=torch.uint8)
            )
            self.bias = bias

        def forward(self, x: Tensor) -> Tensor:
            x_cast = x.to(dtype)
            shape = (self.out_features, self.in_features)
            if torch.is_grad_enabled() and x_cast.requires_grad:
                result: Tensor = _MatMul4Bit.apply(x_cast, shape)  # type: ignore[no-untyped-call]
            else:
                result = x_cast @ torch.empty(shape, dtype=dtype).t()
            return (result if self.bias is None else result + self.bias).to(x.dtype)

    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer is output or not isinstance(layer, nn.Linear | Conv1D):
                continue
            is_transposed = isinstance(layer, Conv1D)
            outputs, inputs = layer.weight.shape[::-1] if is_transposed else layer.weight.shape
            setattr(parent, name, FakeLinear4bit(inputs, outputs, layer.bias))
    model.is_loaded_in_4bit = True


def count_8bit_state_bytes(numel: int) -> int:
    """Bytes of AdamW's 8-bit state of a tensor: two moments and their block scales. Small tensors
    keep fp32 states (bitsandbytes 0.50).
    """
    return 2 * numel + 8 * -(-numel // BLOCK_8BIT) if numel >= MIN_8BIT_SIZE else 8 * numel
