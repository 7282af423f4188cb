"""Causal attention in bf16 over short rows on a CPU, as plain matrix products.

torch's CPU kernel takes 0.9 ms forward and 6.0 ms backward for 8 rows of 66 tokens in SmolLM2-135M's shape, a quarter of a LoRA
step; these products take 0.3 and 0.7 (2 cores, AVX512-BF16), with gradients as near to those in fp64 (off by 0.3 and 0.4 %).
From 512 tokens on torch's kernel is as quick. Like it, this keeps no matrix of all pairs for the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LONGEST = 384  # tokens
SCORE_BYTES = (
    2_000_000  # of scores at once: what two cores' caches hold. Without a bound, 32 rows of 128 tokens take four times as long
)


@lru_cache(maxsize=512)
def causal(length: int, repeats: int) -> Tensor:
    """0 where a token may look, minus infinity behind it; for `repeats` query heads that share a key head, below each other."""
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length).masked_fill_(ahead, -math.inf).repeat(repeats, 1)


def grouped(heads: Tensor, groups: int) -> Tensor:
    """(rows, heads, tokens, width) as (rows x groups, heads of a group x tokens, width)."""
    return heads.reshape(heads.shape[0] * groups, -1, heads.shape[-1])


def some_rows(query: Tensor) -> Iterator[slice]:
    """As many rows at once as SCORE_BYTES allow."""
    rows, heads, length, _ = query.shape
    size = max(1, SCORE_BYTES // (4 * heads * length * length))
    return (slice(at, at + size) for at in range(0, rows, size))


def probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """fp32 (rows x groups, heads of a group x tokens, tokens)."""
    length = key.shape[1]
    scores = torch.bmm(query, key.transpose(1, 2)).float()
    return torch.softmax(scores.mul_(scale).add_(causal(length, query.shape[1] // length)), -1)


class ShortAttention(torch.autograd.Function):
    """softmax(scale q k' + causal) v for query (rows, heads, tokens, width) and keys, values (rows, groups, tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Returns (rows, tokens, heads, width)."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        rows, heads, length, _ = query.shape
        groups = key.shape[1]
        made = query.new_empty(rows, length, heads, value.shape[-1])
        for at in some_rows(query):
            share = probabilities(grouped(query[at], groups), grouped(key[at], groups), scale).to(query.dtype)
            made[at] = torch.bmm(share, grouped(value[at], groups)).view(-1, heads, length, value.shape[-1]).transpose(1, 2)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        groups, scale = key.shape[1], ctx.scale
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for at in some_rows(query):
            q, k, v = (grouped(tensor[at], groups) for tensor in (query, key, value))
            grad = grouped(grads[0][at].transpose(1, 2), groups)
            share = probabilities(q, k, scale)
            weighted = torch.bmm(grad, v.transpose(1, 2)).float().mul_(share)
            # The softmax's derivative: P (dP - rowsum(P dP)).
            grad_scores = weighted.addcmul_(share, weighted.sum(-1, keepdim=True), value=-1).mul_(scale).to(q.dtype)
            found = (
                torch.bmm(grad_scores, k),
                torch.bmm(grad_scores.transpose(1, 2), q),
                torch.bmm(share.to(q.dtype).transpose(1, 2), grad),
            )
            for whole, part in zip(made, found, strict=True):
                whole[at] = part.view_as(whole[at])
        return made[0], made[1], made[2], None


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """transformers' attention function: short where that holds, else as transformers has it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = more.get("is_causal")
    plain = attention_mask is None and not more.get("dropout") and more.get("position_bias") is None and not more.get("softcap")
    fits = query.shape[2] == key.shape[2] and 1 < query.shape[2] <= LONGEST
    on_cpu = query.device.type == "cpu" and {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
    if plain and fits and on_cpu and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        scale = more.get("scaling") or query.shape[-1] ** -0.5
        return ShortAttention.apply(query, key, value, scale), None  # type: ignore[no-untyped-call]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


def quicken_attention() -> None:
    """Models with transformers' `sdpa` attention take this one, in this process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
