"""What a plan is made for, and what a plan is. It knows no ORM, no request and no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.config import RunConfig
from training.errors import UserError
from training.formatting import format_setting

# What the adapter is for -> rank to begin with, and its words. Ranks: Biderman et al. 2024, "LoRA
# Learns Less and Forgets Less" (style needs little, code and mathematics 64 and more), and the
# guides of Unsloth and LLaMA-Factory (8 to 64).
GOALS: dict[str, tuple[int, str]] = {
    "task": (16, "a task, by examples"),
    "style": (8, "a tone or a format"),
    "knowledge": (32, "the knowledge of a field"),
    "hard": (64, "hard tasks, such as code or reasoning"),
}


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """`lengths` and `trained` are int32 arrays of tokens, one number a measured row; bytes are
    those of the device that trains.

    `need(config)` is a memory forecast with `peak`, `precision` and `optimizer`; it raises
    UserError where the technique does not fit the model. `steps(config)` counts optimizer steps.
    """

    model: str
    hidden_size: int
    context_length: int | None
    parameters_per_rank: int  # what one more rank adds over all linear layers
    rows: int
    eval_rows: int
    lengths: NDArray[np.int32]
    trained_lengths: NDArray[np.int32]
    device: str
    total_bytes: int
    free_bytes: int
    forecast_memory: Callable[[RunConfig], Mapping[str, Any]]
    count_steps: Callable[[RunConfig], int]

    @property
    def trained_tokens(self) -> int:
        """Of one epoch over all rows, from the measured ones."""
        return int(self.trained_lengths.sum() * self.rows / max(1, len(self.trained_lengths)))

    def truncated_share(self, length: int) -> float:
        return float((self.lengths > length).mean())


@dataclass(frozen=True)
class Choice:
    """A setting with its sentence, the nearest alternative that was rejected, and where the rule
    comes from.
    """

    setting: str
    value: Any
    why: str
    alternative: str = ""
    source: str = ""
    locked: bool = False


@dataclass(frozen=True)
class Plan:
    goal: str
    choices: list[Choice]
    facts: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return {choice.setting: choice.value for choice in self.choices}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class PlanDraft:
    """A plan in the making. What a person locked wins; the plan's own choice is then told as the
    alternative.
    """

    inputs: PlanInputs
    goal: str
    locked: Mapping[str, Any]
    choices: list[Choice] = field(default_factory=list)

    def choose_setting(
        self, setting: str, value: Any, why: str, *, alternative: str = "", source: str = ""
    ) -> Any:
        if setting in self.locked:
            locked_value = self.locked[setting]
            plan_choice = (
                f"The plan would take {format_setting(value)}: {why}"
                if locked_value != value
                else "The rest is planned around it."
            )
            self.choices.append(
                Choice(
                    setting,
                    locked_value,
                    "You set it.",
                    alternative=plan_choice,
                    source=source,
                    locked=True,
                )
            )
            return locked_value
        self.choices.append(Choice(setting, value, why, alternative, source))
        return value

    def check_unused_locks(self) -> None:
        """Raises UserError: something is locked that the plan does not choose, so the lock would be
        without effect.
        """
        unused = sorted(set(self.locked) - {choice.setting for choice in self.choices})
        if unused:
            raise UserError(
                f"{unused[0]} cannot be locked in this plan; leave it out, or choose the settings.",
                field=unused[0],
            )
