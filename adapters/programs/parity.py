"""Check that a merged model answers like its adapter, by its greedy answers and logits.

The logits are compared along the adapter's own greedy answer, because two answers that differ in
their first token could not be compared any further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.errors import UserError

ANSWER_TOKENS = 48
# Kullback-Leibler divergence in nats per token. Rounding to 16 bits costs 2e-5. Merging into 4 bits
# costs 3.2, as much as having no adapter.
MIN_EFFECT = 1e-6
ROUNDING_DIVERGENCE = 1e-3
MAX_LOST_SHARE = 0.05  # of the adapter's own effect on its base


@dataclass(frozen=True)
class Generation:
    """A greedy answer, as token ids, and the logits that chose them: (answer, vocabulary)."""

    prompt: list[int]
    answer: list[int]
    logits: Tensor

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt, *self.answer]


def generate_greedily(model: Any, prompt: list[int], eos_token_id: int | None) -> Generation:
    """Generate at most ANSWER_TOKENS tokens."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=eos_token_id if eos_token_id is not None else 0,
        )
    answer = output[0, len(prompt) :].tolist()
    return Generation(prompt, answer, compute_logits(model, prompt, answer))


def compute_logits(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """The logits at each position of a fixed answer: (answer, vocabulary)."""
    with torch.inference_mode():
        logits: Tensor = (
            model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].float()
        )
    return logits[-len(answer) - 1 : -1].clone()


def kl_divergence(expected: Tensor, actual: Tensor) -> float:
    """Mean Kullback-Leibler divergence over the rows, in nats per row."""
    return float(
        functional.kl_div(
            actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
        ).clamp_min(0)
    )


def measure_parity(
    references: list[Generation],
    base_logits: list[Tensor],
    model_logits: list[Tensor],
    model_answers: list[list[int]],
) -> dict[str, Any]:
    """The figures of a parity check. `model_logits` are those of the merged model along the
    adapter's answers, and `model_answers` its own answers.
    """
    expected, unadapted, actual = (
        torch.cat([reference.logits for reference in references]),
        torch.cat(base_logits),
        torch.cat(model_logits),
    )
    return {
        "prompts": len(references),
        "tokens": len(expected),
        "same_answers": sum(
            reference.answer == answer
            for reference, answer in zip(references, model_answers, strict=True)
        ),
        "largest_difference": float((expected - actual).abs().max()),
        "mean_difference": float((expected - actual).abs().mean()),
        "same_choice": float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
        "divergence": kl_divergence(expected, actual),
        "divergence_from_base": kl_divergence(unadapted, actual),
        "effect": kl_divergence(expected, unadapted),
        "effect_largest_difference": float((expected - unadapted).abs().max()),
    }


def check_parity(parity: dict[str, Any], model_name: str) -> None:
    """Raises UserError: the model equals its base model, or differs from its adapter."""
    effect, base_divergence, divergence = (
        parity["effect"],
        parity["divergence_from_base"],
        parity["divergence"],
    )
    if effect < MIN_EFFECT:
        raise UserError(
            f"The adapter has no effect: on {parity['prompts']} prompts it differs from its base "
            f"model by {effect:.1e} nats per token, so the {model_name} would equal the base "
            "model. Train longer, or choose another version.",
            code="no_effect",
        )
    if base_divergence < 0.1 * effect:
        raise UserError(
            f"The {model_name} equals its base model: they differ by {base_divergence:.1e} nats "
            f"per token, but the adapter differs by {effect:.1e}. The merge has lost the adapter. "
            "Serve the adapter unmerged.",
            code="adapter_lost",
        )
    if divergence > max(ROUNDING_DIVERGENCE, MAX_LOST_SHARE * effect):
        raise UserError(
            f"The {model_name} does not match its adapter: they differ by {divergence:.1e} nats "
            "per token, where rounding to 16 bits costs 2e-05, and choose the same next token in "
            f"{parity['same_choice']:.0%} of {parity['tokens']} positions. Serve the adapter "
            "unmerged.",
            code="no_parity",
        )
