"""Data types of Auto LLM: the inputs of a plan, its choices, and the plan. No ORM, no HTTP and no
torch here.
"""

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

# Goal of the adapter -> starting rank and description. Ranks: Biderman et al. 2024, "LoRA Learns
# Less and Forgets Less" (style needs little, code and mathematics 64 and more), and the guides of
# Unsloth and LLaMA-Factory (8 to 64).
GOALS: dict[str, tuple[int, str]] = {
    "task": (16, "learning a task from examples"),
    "style": (8, "a tone or format"),
    "knowledge": (32, "domain knowledge"),
    "hard": (64, "hard tasks such as code or reasoning"),
}


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What a plan depends on: model, data, device, and two functions that evaluate a config.

    `lengths` and `trained_lengths` are int32 arrays with the tokens of each measured row; bytes are
    those of the training device. `forecast_memory(config)` returns a forecast with `peak`,
    `precision` and `optimizer`, and raises UserError if the method does not work with the model.
    `count_steps(config)` returns the number of optimizer steps.
    """

    model: str
    hidden_size: int
    context_length: int | None
    parameters_per_rank: int  # Parameters that rank 1 adds over all linear layers
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
        """Trained tokens of one epoch over all rows, estimated from the measured rows."""
        return int(self.trained_lengths.sum() * self.rows / max(1, len(self.trained_lengths)))

    def truncated_share(self, length: int) -> float:
        return float((self.lengths > length).mean())


@dataclass(frozen=True)
class Choice:
    """A setting of the plan with its reason, the closest rejected alternative, and the source of
    the rule.
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
    """A plan under construction. A locked value always wins; the plan's own choice then becomes the
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
                f"The plan would use {format_setting(value)}. {why}"
                if locked_value != value
                else "The plan would use the same value."
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
        """Check that the plan chooses every locked setting.

        Raises:
            UserError: it does not choose a locked setting, so the lock would have no effect.
        """
        unused = sorted(set(self.locked) - {choice.setting for choice in self.choices})
        if unused:
            raise UserError(
                f"{unused[0]} cannot be locked in this plan. Remove the lock, or switch to Manual.",
                field=unused[0],
            )
