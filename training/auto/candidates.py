"""Candidate configurations that a plan tries until one fits the device, fastest first.

Before a slower method, a plan tries smaller batches with gradient accumulation, then gradient
checkpointing (a third more time). Full fine-tuning first reduces AdamW's states to 8 bits and then
the weights to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.auto import rules
from training.auto.plan_types import PlanDraft
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError

PREFERRED_METHODS = ("lora", "qlora")  # Tried in this order unless the method is locked
LAST_RESORT_METHOD = "prompt"  # For models without layers that LoRA could adapt
FEWER_BITS: tuple[dict[str, str], ...] = (
    {},
    {"optim": "adamw_8bit"},
    {"optim": "adamw_8bit", "precision": "bf16"},
)


@dataclass(frozen=True)
class Candidate:
    """A configuration with its memory forecast and the memory available to it."""

    config: RunConfig
    forecast: Mapping[str, Any]
    available_bytes: float

    @property
    def fits_device(self) -> bool:
        return bool(self.forecast["peak"] <= self.available_bytes)

    @property
    def description(self) -> str:
        checkpointing = " with gradient checkpointing" if self.config.gradient_checkpointing else ""
        title = METHODS[self.config.method].title
        return f"{title}{checkpointing}, {self.config.max_tokens_per_batch:,} tokens per batch"


def iter_candidates(
    draft: PlanDraft, common_settings: dict[str, Any], step_tokens: int, problems: list[UserError]
) -> Iterator[Candidate]:
    """Halve the batch, then add gradient checkpointing, then use fewer bits, then the next method.

    A method that does not work with this model is skipped; its error is added to `problems`.
    """
    if "method" in draft.locked:
        yield from iter_method_candidates(
            draft, draft.locked["method"], common_settings, step_tokens
        )
        return
    last_resort = RunConfig.from_dict({"method": LAST_RESORT_METHOD})
    inapplicable = last_resort.get_inapplicable_settings()
    for method in (*PREFERRED_METHODS, LAST_RESORT_METHOD):
        if method == LAST_RESORT_METHOD and (
            len(problems) < len(PREFERRED_METHODS) or inapplicable & set(draft.locked)
        ):
            return
        own_settings = {
            setting: value
            for setting, value in common_settings.items()
            if method != LAST_RESORT_METHOD or setting not in inapplicable
        }
        if method == LAST_RESORT_METHOD and own_settings[
            "max_length"
        ] + last_resort.prepended_tokens > (draft.inputs.context_length or math.inf):
            return  # Rows as long as the context leave no positions for virtual tokens
        try:
            yield from iter_method_candidates(draft, method, own_settings, step_tokens)
        except UserError as error:
            if error.field not in ("model", "method"):
                raise
            problems.append(error)


def iter_method_candidates(
    draft: PlanDraft, method: str, common_settings: dict[str, Any], step_tokens: int
) -> Iterator[Candidate]:
    is_unsupported = "gradient_checkpointing" in METHODS[method].incompatible_settings
    locked_checkpointing = draft.locked.get("gradient_checkpointing")
    checkpointing_options = (False,) if is_unsupported else (False, True)
    if locked_checkpointing is not None:
        checkpointing_options = (locked_checkpointing,)
    for bits in FEWER_BITS if METHODS[method].is_full_finetuning else FEWER_BITS[:1]:
        overrides = {
            setting: value for setting, value in bits.items() if setting not in draft.locked
        }
        if bits and (
            not overrides
            or any(draft.locked.get(setting, value) != value for setting, value in bits.items())
        ):
            continue
        for checkpointing in checkpointing_options:
            yield from iter_batch_halvings(
                draft,
                {
                    **common_settings,
                    **overrides,
                    "method": method,
                    "gradient_checkpointing": checkpointing,
                },
                step_tokens,
            )


def iter_batch_halvings(
    draft: PlanDraft, settings: dict[str, Any], step_tokens: int
) -> Iterator[Candidate]:
    """Halve the batch down to one row. Gradient accumulation keeps the tokens of a step."""
    locked_tokens, locked_accumulation = (
        draft.locked.get("max_tokens_per_batch"),
        draft.locked.get("gradient_accumulation_steps"),
    )
    batch_tokens = locked_tokens or max(
        settings["max_length"], step_tokens // (locked_accumulation or 1)
    )
    while True:
        candidate_settings = settings | {
            "max_tokens_per_batch": batch_tokens,
            "gradient_accumulation_steps": locked_accumulation
            or max(1, round(step_tokens / batch_tokens)),
        }
        config = RunConfig.from_dict(candidate_settings)
        yield Candidate(
            config,
            draft.inputs.forecast_memory(config),
            draft.inputs.free_bytes * (1 - rules.MEMORY_MARGIN),
        )
        smaller = max(config.max_length, rules.round_up(batch_tokens / 2, 16))
        # With rows shorter than 16 tokens there is no smaller batch
        if locked_tokens or smaller >= batch_tokens:
            return
        batch_tokens = smaller
