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
from training.runs.forecast.batch_shapes import shapes_of
from training.runs.forecast.memory import constant_part, memory_forecast
from training.runs.forecast.memory_estimators import Unlawful, kept_law
from training.runs.forecast.target_device import Target
from training.runs.forecast.token_lengths import Lengths, cut_at, kept_lengths

SHORTEST = 64  # tokens; below, rows keep too little to learn from
Settings = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A change of settings. `memory`: what `memory_forecast` says; None where the step has not been
    simulated.
    """

    name: str
    words: str
    changes: Settings
    memory: dict[str, Any] | None


def steps_down(
    config: RunConfig, found: Lengths | None, kind: str
) -> Iterator[tuple[str, str, Settings]]:
    """The ladder: name, sentence and change of each rung that this run has."""
    method = METHODS[config.method]
    if max(shape.rows for shape in shapes_of(found, config)) > 1:
        words = (
            "Half as many rows at once, twice as many passes: the same step, with every row "
            "where it was."
        )
        yield "halve", words, {"micro_batch_splits": 2 * config.micro_batch_splits}
    if not config.gradient_checkpointing and "gradient_checkpointing" not in method.incompatible_settings:
        yield (
            "checkpointing",
            "Compute activations twice: the same step, about a third slower.",
            {"gradient_checkpointing": True},
        )
    if config.max_length // 2 >= SHORTEST:
        length = config.max_length // 2
        cut = (
            f" {100 * cut_at(found, length)['cut_share']:.1f} % of the rows are cut off."
            if found and found.measured
            else ""
        )
        yield "shorter", f"Cut rows at {length:,} tokens.{cut}", {"max_length": length}
    if config.resolve_optimizer(kind) == "adamw_torch":
        words = "Keep the optimizer's state in 8 bits; it begins anew, the weights go on."
        yield "8-bit", words, {"optim": "adamw_8bit"}
    if config.method == "lora":
        yield (
            "qlora",
            "Keep the base model in 4 bits (QLoRA); slower, and the adapter goes on.",
            {"method": "qlora"},
        )


def ways(config: RunConfig, model: BaseModel, found: Lengths | None, target: Target) -> list[Way]:
    """Every way down from these settings, with its forecast where its step has been simulated."""
    constant, made = constant_part(target), []
    for name, words, changes in steps_down(config, found, target.kind):
        try:
            changed = changed_config(config, changes)
            known = kept_law(model.folder, changed, target.kind)
        except (ConfigError, Unlawful):
            continue  # this run cannot go that way
        memory = (
            None
            if known is None
            else memory_forecast(known, changed, found, constant) | {"device": target.name}
        )
        made.append(Way(name, words, changes, memory))
    return made


def changed_config(config: RunConfig, changes: Settings) -> RunConfig:
    """Raises ConfigError: the change contradicts another setting."""
    known = {**config.to_dict(), **changes}
    if "method" in changes:
        wanted = set(RunConfig.from_dict({"method": changes["method"]}).to_dict()) - set(
            METHODS[changes["method"]].incompatible_settings
        )
        known = {name: value for name, value in known.items() if name in wanted}
    return RunConfig.from_dict(known)


def nearest(
    config: RunConfig, model: BaseModel, data: DatasetVersion, most: int, target: Target
) -> str:
    """The first change that would fit into `most` bytes, as a sentence; what is not simulated yet
    is not looked at.
    """
    found = kept_lengths(data, model, train_on_prompt=config.train_on_prompt)
    tried, halved = config, 0
    while halved < 12:
        down = ways(tried, model, found, target)
        fitting = next(
            (way for way in down if way.memory is not None and way.memory["peak"] <= most), None
        )
        if fitting is not None:
            told = ", ".join(f"{name} {value}" for name, value in fitting.changes.items())
            return f"With {told} it would need {format_bytes(fitting.memory['peak'])}."  # type: ignore[index]
        halve = next((way for way in down if way.name == "halve"), None)
        if halve is None:
            break
        tried, halved = replace(tried, micro_batch_splits=tried.micro_batch_splits * 2), halved + 1
    return "Choose a smaller batch, gradient checkpointing, a shorter max_length, or QLoRA."
