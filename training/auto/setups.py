"""The ways to run that a plan goes through until one fits: the quickest first.

Before a slower technique comes a smaller batch (costs nothing but patience: gradients are
accumulated), then gradient checkpointing (a third more time). Full fine-tuning gives up bits of
AdamW's states, then of the weights, before it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.auto import rules
from training.auto.situation import Draft
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError

TECHNIQUES = ("lora", "qlora")  # that a plan takes by itself, in this order
LAST_RESORT = "prompt"  # where the model has nothing that those could adapt
FEWER_BITS: tuple[dict[str, str], ...] = (
    {},
    {"optim": "adamw_8bit"},
    {"optim": "adamw_8bit", "precision": "bf16"},
)


@dataclass(frozen=True)
class Setup:
    """One way to run: what it takes of memory at its fullest moment, and what is free for it."""

    config: RunConfig
    need: Mapping[str, Any]
    room: float

    @property
    def fits(self) -> bool:
        return bool(self.need["peak"] <= self.room)

    @property
    def words(self) -> str:
        checkpointing = " with gradient checkpointing" if self.config.gradient_checkpointing else ""
        return (
            f"{METHODS[self.config.method].title}{checkpointing}, {self.config.max_tokens_per_batch:,} "
            "tokens at once"
        )


def setups(
    draft: Draft, common: dict[str, Any], tokens: int, problems: list[UserError]
) -> Iterator[Setup]:
    """Batches cut in halves, then gradient checkpointing, then fewer bits, then the next technique.

    A technique that this model cannot have is passed over; why goes to `problems`.
    """
    if "method" in draft.locked:
        yield from of_technique(draft, draft.locked["method"], common, tokens)
        return
    last = RunConfig.from_dict({"method": LAST_RESORT})
    foreign = last.inapplicable_settings()
    for name in (*TECHNIQUES, LAST_RESORT):
        if name == LAST_RESORT and (len(problems) < len(TECHNIQUES) or foreign & set(draft.locked)):
            return
        mine = {
            setting: value
            for setting, value in common.items()
            if name != LAST_RESORT or setting not in foreign
        }
        if name == LAST_RESORT and mine["max_length"] + last.prepended_tokens > (
            draft.situation.context_length or math.inf
        ):
            return  # rows as long as the context leave no room in front of them
        try:
            yield from of_technique(draft, name, mine, tokens)
        except UserError as error:
            if error.field not in ("model", "method"):
                raise
            problems.append(error)


def of_technique(draft: Draft, name: str, common: dict[str, Any], tokens: int) -> Iterator[Setup]:
    never = "gradient_checkpointing" in METHODS[name].incompatible_settings
    lock = draft.locked.get("gradient_checkpointing")
    tries = (False,) if never else (False, True)
    if lock is not None:
        tries = (lock,)
    for bits in FEWER_BITS if METHODS[name].is_full_finetuning else FEWER_BITS[:1]:
        more = {setting: value for setting, value in bits.items() if setting not in draft.locked}
        if bits and (
            not more
            or any(draft.locked.get(setting, value) != value for setting, value in bits.items())
        ):
            continue
        for checkpointing in tries:
            yield from halvings(
                draft,
                {**common, **more, "method": name, "gradient_checkpointing": checkpointing},
                tokens,
            )


def halvings(draft: Draft, settings: dict[str, Any], tokens: int) -> Iterator[Setup]:
    """The batch whole, then in halves down to one row, with as many accumulated."""
    lock, times = draft.locked.get("max_tokens_per_batch"), draft.locked.get("gradient_accumulation_steps")
    at_once = lock or max(settings["max_length"], tokens // (times or 1))
    while True:
        whole = settings | {
            "max_tokens_per_batch": at_once,
            "gradient_accumulation_steps": times or max(1, round(tokens / at_once)),
        }
        config = RunConfig.from_dict(whole)
        yield Setup(config, draft.situation.need(config), draft.situation.free * (1 - rules.SPARE))
        smaller = max(config.max_length, rules.up_to(at_once / 2, 16))
        if lock or smaller >= at_once:  # rows shorter than 16 tokens leave no smaller batch
            return
        at_once = smaller
