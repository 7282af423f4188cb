"""What a launch will do, in numbers: rows, tokens, steps, batch, trainable parameters, device and
files. Nothing is trained.
"""

from __future__ import annotations

from typing import Any

from training.catalog.metadata import linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import get_cached_forecast
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import TokenLengths, get_truncation_stats

TRUNCATION_WARNING_SHARE = 0.01


def forecast_run(
    config: RunConfig,
    model: BaseModel,
    version: DatasetVersion,
    lengths: TokenLengths | None,
    target: TargetDevice,
) -> dict[str, Any]:
    """The card's numbers; those that need token lengths are absent until these are measured."""
    memory = get_cached_forecast(config, model, lengths, target)
    trainable = memory["trainable"] if memory else count_lora_parameters(model, config)
    summary: dict[str, Any] = {
        "rows": version.train_rows,
        "eval_rows": min(version.eval_rows, config.eval_rows),
        "batch": format_batch(config),
        "length": config.max_length,
        "trainable": trainable,
        "parameters": model.metadata.get("parameters"),
        "device": target.description,
        "adapter_bytes": 4 * trainable if trainable else None,  # what is trained is kept in fp32
        "checkpoint_bytes": 12 * trainable if trainable else None,  # and AdamW's two moments
        "memory": memory and memory | describe_fit(memory, target),
        "warnings": collect_warnings(config, model, lengths),
    }
    if lengths is not None:
        truncation = get_truncation_stats(lengths, config.max_length)
        steps, tokens, exact = count_steps(lengths, config)
        summary |= {
            "lengths": truncation,
            "steps": steps,
            "exact": exact,
            "tokens": tokens,
            "evals": 1 + -(-steps // config.eval_steps),
        }
    return summary


def check_data_fits_model(lengths: TokenLengths | None) -> None:
    """Raises UserError: the engine would refuse the data, so the launch does."""
    if lengths is not None and lengths.fault:
        raise UserError(
            f"This model cannot be trained on this data; the first such row is {lengths.fault}",
            field="data",
        )


def collect_warnings(
    config: RunConfig, model: BaseModel, lengths: TokenLengths | None
) -> list[str]:
    """What is unwise about these settings with this model and, where its lengths are known, this
    data.
    """
    length_based = (
        get_length_warnings(get_truncation_stats(lengths, config.max_length), config)
        if lengths is not None
        else []
    )
    return config.list_warnings() + get_context_warnings(config, model) + length_based


def format_batch(config: RunConfig) -> str:
    """`2 x 4 = 8 rows a step`, or tokens."""
    count, unit = (
        (config.per_device_train_batch_size, "rows")
        if config.batch_unit == "rows"
        else (config.max_tokens_per_batch, "tokens")
    )
    if config.gradient_accumulation_steps == 1:
        return f"{count:,} {unit} a step"
    return f"{count:,} x {config.gradient_accumulation_steps:,} = {count * config.gradient_accumulation_steps:,} {unit} a step"


def describe_fit(memory: dict[str, Any], target: TargetDevice) -> dict[str, Any]:
    """Does it fit what is free now? In words, and shares of the whole device for the bar."""
    required, total, free = memory["peak"], target.total, target.free
    if required <= free:
        verdict = "fits"
    else:
        verdict = "does not fit now" if required <= total else "can never fit this device"
    bar = [
        (name, round(100 * value / max(total, required), 2), value)
        for name, value in memory["kinds"].items()
        if value
    ]
    return {"verdict": verdict, "fits": required <= free, "free": free, "total": total, "bar": bar}


def count_lora_parameters(model: BaseModel, config: RunConfig) -> int | None:
    """Rank x (in + out) for every linear layer that LoRA touches (Hu et al. 2021, 4.1). Others tell
    it with their law.
    """
    if "rank" not in METHODS[config.method].settings or config.use_dora or config.rank_pattern:
        return None
    target_modules = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    layers = linear_layers(model.folder)
    shapes = [
        shape
        for name, shape in layers
        if target_modules == ["all-linear"]
        or any(f".{name}".endswith(f".{suffix}") for suffix in target_modules)
    ]
    return sum(config.rank * (rows + columns) for rows, columns in shapes)


def get_context_warnings(config: RunConfig, model: BaseModel) -> list[str]:
    context_length = model.metadata.get("context_length")
    virtual_tokens = config.prepended_tokens
    if context_length and config.max_length + virtual_tokens > context_length:
        virtual_text = (
            f" and {virtual_tokens:,} virtual tokens stand in front" if virtual_tokens else ""
        )
        return [
            f"max_length is {config.max_length:,}{virtual_text}, but {model.name} was made for at most "
            f"{context_length:,} tokens."
        ]
    return []


def get_length_warnings(truncation: dict[str, Any], config: RunConfig) -> list[str]:
    warnings = []
    if truncation["empty"]:
        rows_text = f"{truncation['empty']:,} of {truncation['measured_rows']:,} rows"
        warnings.append(
            f"{rows_text} keep nothing to train within {config.max_length:,} tokens; they are left "
            "out. Raise max_length."
        )
    if truncation["truncated_share"] > TRUNCATION_WARNING_SHARE:
        warnings.append(
            f"{truncation['truncated']:,} of {truncation['measured_rows']:,} rows are truncated off at {config.max_length:,} "
            f"tokens ({100 * truncation['truncated_share']:.1f} %); the longest has {truncation['longest']:,}. "
            "Raise max_length."
        )
    return warnings
