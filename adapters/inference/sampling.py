"""Choose the next token from logits: greedy at temperature 0, else nucleus (top-p) sampling
(Holtzman et al. 2019).
"""

from __future__ import annotations

import torch

MIN_TEMPERATURE = 1e-4  # below it, sampling equals greedy decoding, and dividing would overflow


def pick_token(
    logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Sample from the smallest set of tokens with a total probability of at least `top_p`.

    `logits` have shape (vocabulary,).
    """
    if temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    sorted_probabilities, tokens = probabilities.sort(descending=True)
    mass_before = sorted_probabilities.cumsum(0) - sorted_probabilities
    is_excluded = mass_before >= top_p
    is_excluded[0] = False  # the likeliest token stays, even with top_p 0
    sorted_probabilities = sorted_probabilities.masked_fill(is_excluded, 0.0)
    return int(tokens[torch.multinomial(sorted_probabilities, 1, generator=generator)])


def compute_logprobs(logits: torch.Tensor, ids: list[int]) -> list[float | None]:
    """The log-probability (natural) of each token, from logits of shape (tokens, vocabulary). The
    first token has none.
    """
    if len(ids) < 2:
        return [None] * len(ids)
    logprobs = torch.log_softmax(logits[:-1].float(), -1)
    return [
        None,
        *logprobs[
            torch.arange(len(ids) - 1), torch.tensor(ids[1:], device=logprobs.device)
        ].tolist(),
    ]
