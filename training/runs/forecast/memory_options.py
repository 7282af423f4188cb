"""The ladder down in memory: changes of settings with their forecasts, from the one that costs
least to the last.

A run that ran out of memory goes on by one of them (worker/oom_recovery.py), and a launch that is
refused is told the nearest that would fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import ConfigError
from training.formatting import format_bytes
from training.runs.forecast.batch_shapes import get_batch_shapes
from training.runs.forecast.memory import forecast_memory, get_fixed_overhead
from training.runs.forecast.memory_estimators import CannotEstimate, get_cached_estimator
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import (
    TokenLengths,
    get_cached_lengths,
    get_truncation_stats,
)

MIN_LENGTH = 64  # tokens; below, rows keep too little to learn from
Settings = dict[str, Any]


@dataclass(frozen=True)
class MemoryOption:
    """A change of settings. `memory`: what `forecast_memory` says; None where the step has not been
    simulated.
    """

    name: str
    description: str
    changes: Settings
    memory: dict[str, Any] | None


def iter_reductions(
    config: RunConfig, lengths: TokenLengths | None, kind: str
) -> Iterator[tuple[str, str, Settings]]:
    """The ladder: name, sentence and change of each rung that this run has."""
    method = METHODS[config.method]
    if max(shape.rows for shape in get_batch_shapes(lengths, config)) > 1:
        description = (
            "Half as many rows at once, twice as many passes: the same step, with every row "
            "where it was."
        )
        yield "halve", description, {"micro_batch_splits": 2 * config.micro_batch_splits}
    if (
        not config.gradient_checkpointing
        and "gradient_checkpointing" not in method.incompatible_settings
    ):
        yield (
            "checkpointing",
            "Compute activations twice: the same step, about a third slower.",
            {"gradient_checkpointing": True},
        )
    if config.max_length // 2 >= MIN_LENGTH:
        length = config.max_length // 2
        truncated_rows = (
            f" {100 * get_truncation_stats(lengths, length)['truncated_share']:.1f} % of the rows are cut off."
            if lengths and lengths.measured_rows
            else ""
        )
        yield "shorter", f"Cut rows at {length:,} tokens.{truncated_rows}", {"max_length": length}
    if config.resolve_optimizer(kind) == "adamw_torch":
        description = "Keep the optimizer's state in 8 bits; it begins anew, the weights go on."
        yield "8-bit", description, {"optim": "adamw_8bit"}
    if config.method == "lora":
        yield (
            "qlora",
            "Keep the base model in 4 bits (QLoRA); slower, and the adapter goes on.",
            {"method": "qlora"},
        )


def list_memory_options(
    config: RunConfig, model: BaseModel, lengths: TokenLengths | None, target: TargetDevice
) -> list[MemoryOption]:
    """Every way down from these settings, with its forecast where its step has been simulated."""
    overhead, options = get_fixed_overhead(target), []
    for name, description, changes in iter_reductions(config, lengths, target.kind):
        try:
            changed = build_changed_config(config, changes)
            estimator = get_cached_estimator(model.folder, changed, target.kind)
        except (ConfigError, CannotEstimate):
            continue  # this run cannot go that way
        memory = (
            None
            if estimator is None
            else forecast_memory(estimator, changed, lengths, overhead) | {"device": target.name}
        )
        options.append(MemoryOption(name, description, changes, memory))
    return options


def build_changed_config(config: RunConfig, changes: Settings) -> RunConfig:
    """Raises ConfigError: the change contradicts another setting."""
    settings = {**config.to_dict(), **changes}
    if "method" in changes:
        applicable = set(RunConfig.from_dict({"method": changes["method"]}).to_dict()) - set(
            METHODS[changes["method"]].incompatible_settings
        )
        settings = {name: value for name, value in settings.items() if name in applicable}
    return RunConfig.from_dict(settings)


def suggest_fitting_change(
    config: RunConfig, model: BaseModel, data: DatasetVersion, max_bytes: int, target: TargetDevice
) -> str:
    """The first change that would fit into `most` bytes, as a sentence; what is not simulated yet
    is not looked at.
    """
    lengths = get_cached_lengths(data, model, train_on_prompt=config.train_on_prompt)
    candidate, halvings = config, 0
    while halvings < 12:
        options = list_memory_options(candidate, model, lengths, target)
        fitting = next(
            (
                option
                for option in options
                if option.memory is not None and option.memory["peak"] <= max_bytes
            ),
            None,
        )
        if fitting is not None:
            changes = ", ".join(f"{name} {value}" for name, value in fitting.changes.items())
            return f"With {changes} it would need {format_bytes(fitting.memory['peak'])}."  # type: ignore[index]
        halve = next((option for option in options if option.name == "halve"), None)
        if halve is None:
            break
        candidate, halvings = (
            replace(candidate, micro_batch_splits=candidate.micro_batch_splits * 2),
            halvings + 1,
        )
    return "Choose a smaller batch, gradient checkpointing, a shorter max_length, or QLoRA."
