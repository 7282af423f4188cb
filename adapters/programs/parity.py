"""Does a merged or exported model answer as its adapter does? The same prompts through each,
greedily, and their logits compared.

Logits are compared where an answer is made, along the adapter's own greedy answer: a text that
differs in its first word could not be compared any further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.errors import UserError

ANSWER_TOKENS = 48
# Kullback-Leibler divergence in nats a token. Rounding to 16 bits costs 2e-5 (peft-facts, section
# 5); merging into 4 bits cost 3.2, as much as having no adapter.
NO_EFFECT = 1e-6
ROUNDING = 1e-3
MOST_LOST = 0.05  # of the adapter's own effect on its base


@dataclass(frozen=True)
class Spoken:
    """A model's greedy answer to a prompt, (answer,) ids, and its logits at each of them, (answer,
    vocabulary).
    """

    prompt: list[int]
    answer: list[int]
    logits: Tensor

    @property
    def whole(self) -> list[int]:
        return [*self.prompt, *self.answer]


def speak(model: Any, prompt: list[int], ends: int | None) -> Spoken:
    """Answer greedily, at most ANSWER_TOKENS."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=ends if ends is not None else 0,
        )
    answer = said[0, len(prompt) :].tolist()
    return Spoken(prompt, answer, logits_of(model, prompt, answer))


def logits_of(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """(answer, vocabulary): what the model says at each place of an answer that is given to it."""
    with torch.inference_mode():
        logits: Tensor = (
            model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].float()
        )
    return logits[-len(answer) - 1 : -1].clone()


def divergence(true: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence over the rows, in nats."""
    return float(
        functional.kl_div(
            other.log_softmax(-1), true.log_softmax(-1), log_target=True, reduction="batchmean"
        ).clamp_min(0)
    )


def compared(
    adapter: list[Spoken], base: list[Tensor], made: list[Tensor], answers: list[list[int]]
) -> dict[str, Any]:
    """The figures of a parity check. `made`: the new model's logits along the adapter's answers;
    `answers`: its own.
    """
    told, plain, new = torch.cat([one.logits for one in adapter]), torch.cat(base), torch.cat(made)
    return {
        "prompts": len(adapter),
        "tokens": len(told),
        "same_answers": sum(
            one.answer == answer for one, answer in zip(adapter, answers, strict=True)
        ),
        "largest_difference": float((told - new).abs().max()),
        "mean_difference": float((told - new).abs().mean()),
        "same_choice": float((told.argmax(-1) == new.argmax(-1)).float().mean()),
        "divergence": divergence(told, new),
        "divergence_from_base": divergence(plain, new),
        "effect": divergence(told, plain),
        "effect_largest_difference": float((told - plain).abs().max()),
    }


def refuse_unlike(figures: dict[str, Any], what: str) -> None:
    """Raises UserError: the model equals its base, or answers unlike its adapter."""
    effect, from_base, apart = (
        figures["effect"],
        figures["divergence_from_base"],
        figures["divergence"],
    )
    if effect < NO_EFFECT:
        raise UserError(
            f"The adapter answers {figures['prompts']} prompts like its base ({effect:.1e} nats a "
            f"token apart), so the {what} would equal its base. Train it further, or take another "
            "version."
        )
    if from_base < 0.1 * effect:
        raise UserError(
            f"The {what} equals its base: it is {from_base:.1e} nats a token from it, and the "
            f"adapter is {effect:.1e}. The adapter was lost on the way; answer with it attached "
            "instead."
        )
    if apart > max(ROUNDING, MOST_LOST * effect):
        raise UserError(
            f"The {what} answers unlike its adapter: {apart:.1e} nats a token apart, where "
            f"rounding to 16 bits costs 2e-05; the same next token in {figures['same_choice']:.0%} "
            f"of {figures['tokens']} places. Answer with it attached instead."
        )
