"""Causal attention for short bf16 sequences on a CPU, as plain matrix products with fp32 scores,
as in torch's kernel.

For 8 rows of 66 tokens in SmolLM2-135M's shape, torch's kernel takes 0.9 ms forward and 6.0 ms
backward, a quarter of a LoRA step. These products take 1.9 ms together (2 cores, AVX512-BF16). At
128 tokens they take half as long as torch, and from 256 tokens they are slower. Like torch's
kernel, this does not store the attention matrix for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.engine.memory_estimator import MAX_SHORT_LENGTH, count_chunk_rows

# 0 at positions a token may attend to, minus infinity at later ones. Shorter rows use a part of it.
# It is created at import, because memory simulations must not count it.
CAUSAL_MASK = torch.zeros(MAX_SHORT_LENGTH, MAX_SHORT_LENGTH).masked_fill_(
    torch.ones(MAX_SHORT_LENGTH, MAX_SHORT_LENGTH, dtype=torch.bool).triu(1), -math.inf
)


def fold_heads(heads: Tensor, groups: int) -> Tensor:
    """Reshape (rows, heads, tokens, width) to (rows x groups, heads per group x tokens, width)."""
    return heads.reshape(heads.shape[0] * groups, -1, heads.shape[-1])


def iter_row_chunks(query: Tensor) -> Iterator[slice]:
    rows, heads, length, _ = query.shape
    size = count_chunk_rows(heads, length)
    return (slice(start, start + size) for start in range(0, rows, size))


def compute_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return attention probabilities in fp32, (rows x groups, heads per group x tokens, tokens).
    Scores around 40 are common, which bf16 would round by 0.1.
    """
    length = key.shape[1]
    scores = torch.bmm(query.float(), key.float().transpose(1, 2)).mul_(scale)
    scores.view(len(key), -1, length, length).add_(CAUSAL_MASK[:length, :length])
    return torch.softmax(scores, -1)


class ShortAttention(torch.autograd.Function):
    """softmax(scale q k' + causal mask) v for query (rows, heads, tokens, width) and keys, values
    (rows, groups, tokens, width).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Returns (rows, tokens, heads, width)."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        rows, heads, length, _ = query.shape
        groups = key.shape[1]
        output = query.new_empty(rows, length, heads, value.shape[-1])
        with torch.autocast("cpu", enabled=False):  # it would round the scores
            for chunk in iter_row_chunks(query):
                probs = compute_probabilities(
                    fold_heads(query[chunk], groups), fold_heads(key[chunk], groups), scale
                ).to(query.dtype)
                output[chunk] = (
                    torch.bmm(probs, fold_heads(value[chunk], groups))
                    .view(-1, heads, length, value.shape[-1])
                    .transpose(1, 2)
                )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        groups = key.shape[1]
        results = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for chunk in iter_row_chunks(query):
            chunk_tensors = (
                query[chunk],
                key[chunk],
                value[chunk],
                grads[0][chunk].transpose(1, 2),
            )
            q, k, v, grad = (fold_heads(tensor, groups) for tensor in chunk_tensors)
            chunk_gradients = compute_gradients(q, k, v, grad, ctx.scale)
            for result, part in zip(results, chunk_gradients, strict=True):
                result[chunk] = part.view_as(result[chunk])
        return results[0], results[1], results[2], None


def compute_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, all in the shape of `fold_heads`. A separate
    function, so that its intermediate tensors are freed before the next chunk.
    """
    probs = compute_probabilities(query, key, scale)
    weighted = torch.bmm(grad, value.transpose(1, 2)).float().mul_(probs)
    # Derivative of softmax: P (dP - rowsum(P dP))
    grad_scores = (
        weighted.addcmul_(probs, weighted.sum(-1, keepdim=True), value=-1)
        .mul_(scale)
        .to(query.dtype)
    )
    grad_value = torch.bmm(probs.to(query.dtype).transpose(1, 2), grad)
    return torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query), grad_value


def short_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """An attention function for transformers: short attention if the inputs allow it, otherwise
    transformers' own `sdpa`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = kwargs.get("is_causal")
    is_plain = (
        attention_mask is None
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and not kwargs.get("softcap")
    )
    is_short = query.shape[2] == key.shape[2] and 1 < query.shape[2] <= MAX_SHORT_LENGTH
    if torch.is_autocast_enabled("cpu"):  # autocast casts the inputs of torch's kernel, too
        query, key, value = (
            tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value)
        )
    is_cpu_bf16 = query.device.type == "cpu" and {query.dtype, key.dtype, value.dtype} == {
        torch.bfloat16
    }
    if (
        is_plain
        and is_short
        and is_cpu_bf16
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return ShortAttention.apply(query, key, value, scale), None  # type: ignore[no-untyped-call]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def use_short_attention() -> None:
    """Replace transformers' `sdpa` attention in this process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", short_attention_forward)
