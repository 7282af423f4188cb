"""What a launch will do, in numbers: rows, tokens, steps, batch, trainable parameters, device and
files. Nothing is trained.
"""

from __future__ import annotations

from typing import Any

from training.catalog.card import linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import kept_forecast
from training.runs.forecast.target_device import Target
from training.runs.forecast.token_lengths import Lengths, cut_at

CUT_WARNING = 0.01


def forecast(
    config: RunConfig,
    model: BaseModel,
    version: DatasetVersion,
    found: Lengths | None,
    target: Target,
) -> dict[str, Any]:
    """The card's numbers; those that need token lengths are absent until these are measured."""
    memory = kept_forecast(config, model, found, target)
    trainable = memory["trainable"] if memory else trainable_parameters(model, config)
    said: dict[str, Any] = {
        "rows": version.train_rows,
        "heldout_rows": min(version.heldout_rows, config.eval_rows),
        "batch": batch_words(config),
        "length": config.max_length,
        "trainable": trainable,
        "parameters": model.card.get("parameters"),
        "device": target.words,
        "adapter_bytes": 4 * trainable if trainable else None,  # what is trained is kept in fp32
        "checkpoint_bytes": 12 * trainable if trainable else None,  # and AdamW's two moments
        "memory": memory and memory | fit_words(memory, target),
        "warnings": all_warnings(config, model, found),
    }
    if found is not None:
        facts = cut_at(found, config.max_length)
        steps, tokens, exact = count_steps(found, config)
        said |= {
            "lengths": facts,
            "steps": steps,
            "exact": exact,
            "tokens": tokens,
            "evals": 1 + -(-steps // config.eval_steps),
        }
    return said


def refuse_fault(found: Lengths | None) -> None:
    """Raises UserError: the engine would refuse the data, so the launch does."""
    if found is not None and found.fault:
        raise UserError(
            f"This model cannot be trained on this data; the first such row is {found.fault}",
            field="data",
        )


def all_warnings(config: RunConfig, model: BaseModel, found: Lengths | None) -> list[str]:
    """What is unwise about these settings with this model and, where its lengths are known, this
    data.
    """
    known = length_warnings(cut_at(found, config.max_length), config) if found is not None else []
    return config.list_warnings() + context_warnings(config, model) + known


def batch_words(config: RunConfig) -> str:
    """`2 x 4 = 8 rows a step`, or tokens."""
    one, unit = (
        (config.per_device_train_batch_size, "rows")
        if config.batch_unit == "rows"
        else (config.max_tokens_per_batch, "tokens")
    )
    if config.gradient_accumulation_steps == 1:
        return f"{one:,} {unit} a step"
    return f"{one:,} x {config.gradient_accumulation_steps:,} = {one * config.gradient_accumulation_steps:,} {unit} a step"


def fit_words(memory: dict[str, Any], target: Target) -> dict[str, Any]:
    """Does it fit what is free now? In words, and shares of the whole device for the bar."""
    need, total, free = memory["peak"], target.total, target.free
    if need <= free:
        verdict = "fits"
    else:
        verdict = "does not fit now" if need <= total else "can never fit this device"
    bar = [
        (name, round(100 * value / max(total, need), 2), value)
        for name, value in memory["kinds"].items()
        if value
    ]
    return {"verdict": verdict, "fits": need <= free, "free": free, "total": total, "bar": bar}


def trainable_parameters(model: BaseModel, config: RunConfig) -> int | None:
    """Rank x (in + out) for every linear layer that LoRA touches (Hu et al. 2021, 4.1). Others tell
    it with their law.
    """
    if "rank" not in METHODS[config.method].settings or config.use_dora or config.rank_pattern:
        return None
    wanted = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    layers = linear_layers(model.folder)
    chosen = [
        shape
        for name, shape in layers
        if wanted == ["all-linear"] or any(f".{name}".endswith(f".{one}") for one in wanted)
    ]
    return sum(config.rank * (rows + columns) for rows, columns in chosen)


def context_warnings(config: RunConfig, model: BaseModel) -> list[str]:
    most = model.card.get("context_length")
    virtual = config.prepended_tokens
    if most and config.max_length + virtual > most:
        beside = f" and {virtual:,} virtual tokens stand in front" if virtual else ""
        return [
            f"max_length is {config.max_length:,}{beside}, but {model.name} was made for at most "
            f"{most:,} tokens."
        ]
    return []


def length_warnings(facts: dict[str, Any], config: RunConfig) -> list[str]:
    found = []
    if facts["empty"]:
        words = f"{facts['empty']:,} of {facts['measured']:,} rows"
        found.append(
            f"{words} keep nothing to train within {config.max_length:,} tokens; they are left "
            "out. Raise max_length."
        )
    if facts["cut_share"] > CUT_WARNING:
        found.append(
            f"{facts['cut']:,} of {facts['measured']:,} rows are cut off at {config.max_length:,} "
            f"tokens ({100 * facts['cut_share']:.1f} %); the longest has {facts['longest']:,}. "
            "Raise max_length."
        )
    return found
