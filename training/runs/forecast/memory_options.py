"""Memory options: changes of settings that lower the memory of a run, each with its forecast, in
order of increasing cost.

A run that ran out of memory can resume with one of them (worker/oom_recovery.py), and a launch that
does not fit suggests the first one that does.
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
from training.formatting import format_bytes, format_percent
from training.runs.forecast.batch_shapes import get_batch_shapes
from training.runs.forecast.memory import forecast_memory, get_fixed_overhead
from training.runs.forecast.memory_estimators import CannotEstimate, get_cached_estimator
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import (
    TokenLengths,
    get_run_lengths,
    get_truncation_stats,
)

MIN_LENGTH = 64  # tokens; shorter rows contain too little to learn from
Settings = dict[str, Any]


@dataclass(frozen=True)
class MemoryOption:
    """A change of settings. `memory` is its forecast (see `forecast_memory`), or None if it has not
    been simulated yet.
    """

    name: str
    description: str
    changes: Settings
    memory: dict[str, Any] | None


def iter_reductions(
    config: RunConfig, lengths: TokenLengths | None, kind: str
) -> Iterator[tuple[str, str, Settings]]:
    """Name, description and changed settings of each option that applies to this run."""
    method = METHODS[config.method]
    if max(shape.rows for shape in get_batch_shapes(lengths, config)) > 1:
        description = (
            "Split each batch into twice as many micro-batches. The optimizer step stays the same, "
            "on the same rows."
        )
        yield "halve", description, {"micro_batch_splits": 2 * config.micro_batch_splits}
    if (
        not config.gradient_checkpointing
        and "gradient_checkpointing" not in method.incompatible_settings
    ):
        yield (
            "checkpointing",
            "Turn on gradient checkpointing. The step stays the same, but is about a third slower.",
            {"gradient_checkpointing": True},
        )
    if config.max_length // 2 >= MIN_LENGTH:
        length = config.max_length // 2
        description = f"Truncate rows at {length:,} tokens."
        if lengths and lengths.measured_rows:
            share = get_truncation_stats(lengths, length)["truncated_share"]
            description += f" This truncates {format_percent(share)} of the rows."
        yield "shorter", description, {"max_length": length}
    if config.resolve_optimizer(kind) == "adamw_torch":
        description = (
            "Store the optimizer state in 8 bits. The state restarts; the weights are kept."
        )
        yield "8-bit", description, {"optim": "adamw_8bit"}
    if config.method == "lora":
        yield (
            "qlora",
            "Quantize the base model to 4 bits (QLoRA). Slower; the adapter is kept.",
            {"method": "qlora"},
        )


def list_memory_options(
    config: RunConfig, model: BaseModel, lengths: TokenLengths | None, target: TargetDevice
) -> list[MemoryOption]:
    """Every memory option for these settings, with its forecast if it has been simulated."""
    overhead, options = get_fixed_overhead(target), []
    for name, description, changes in iter_reductions(config, lengths, target.kind):
        try:
            changed = build_changed_config(config, changes)
            estimator = get_cached_estimator(model.folder, changed, target.kind)
        except (ConfigError, CannotEstimate):
            continue  # this option does not apply to the run
        memory = (
            None
            if estimator is None
            else forecast_memory(estimator, changed, lengths, overhead) | {"device": target.name}
        )
        options.append(MemoryOption(name, description, changes, memory))
    return options


def build_changed_config(config: RunConfig, changes: Settings) -> RunConfig:
    """The config with the changes applied. Settings that the new method does not have are dropped.

    Raises:
        ConfigError: a change contradicts another setting.
    """
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
    """A sentence that names the first change with which the run would fit into `max_bytes`. Only
    options that have been simulated are considered.
    """
    lengths = get_run_lengths(data, model, config)
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
        if fitting is not None and fitting.memory is not None:
            changes = ", ".join(f"{name} {value}" for name, value in fitting.changes.items())
            return f"With {changes} it would need {format_bytes(fitting.memory['peak'])}."
        halve = next((option for option in options if option.name == "halve"), None)
        if halve is None:
            break
        candidate, halvings = (
            replace(candidate, micro_batch_splits=candidate.micro_batch_splits * 2),
            halvings + 1,
        )
    return "Use a smaller batch, gradient checkpointing, a smaller max_length, or QLoRA."
