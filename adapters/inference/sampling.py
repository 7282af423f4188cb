"""From logits to the next token: greedy at temperature 0, else nucleus sampling (Holtzman et al.
2019).
"""

from __future__ import annotations

import torch

COLDEST = 1e-4  # below it, dividing by it overflows before it would change the choice


def pick_token(
    logits: torch.Tensor, *, temperature: float, top_p: float, draw: torch.Generator
) -> int:
    """Logits of shape (vocabulary,). The smallest set of tokens with at least `top_p` of the
    probability is drawn from.
    """
    if temperature < COLDEST:
        return int(logits.argmax())
    chances = torch.softmax(logits.float() / temperature, dim=-1)
    ordered, tokens = chances.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    hidden = before >= top_p
    hidden[0] = False  # also where top_p is 0
    ordered = ordered.masked_fill(hidden, 0.0)
    return int(tokens[torch.multinomial(ordered, 1, generator=draw)])


def logprobs_of(logits: torch.Tensor, ids: list[int]) -> list[float | None]:
    """The natural logarithm of each token's probability, from logits of shape (tokens, vocabulary);
    the first has none.
    """
    if len(ids) < 2:
        return [None] * len(ids)
    told = torch.log_softmax(logits[:-1].float(), -1)
    return [
        None,
        *told[torch.arange(len(ids) - 1), torch.tensor(ids[1:], device=told.device)].tolist(),
    ]
