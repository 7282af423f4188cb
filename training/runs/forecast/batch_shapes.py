"""The batches that a run's data makes, by the engine's own rules: how many steps they are, and
which shapes a step may have.

Drawing 2,322 rows takes 2 ms an epoch, and one answer to a moved slider asks for a dozen epochs.
Most sliders move no row to another batch: what was drawn last is remembered.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from training.engine.batches import build_epoch_batches, get_sequence_length, split_batch, plan_steps
from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape
from training.runs.forecast.token_lengths import Lengths, trained_within

# The settings that decide which rows go through the model together, and for how many steps.
BATCHING = (
    *("epochs", "max_steps", "gradient_accumulation_steps", "batch_unit", "per_device_train_batch_size"),
    *("max_tokens_per_batch", "micro_batch_splits", "packing", "max_length", "seed"),
)
# rows x epochs that are planned one by one (a fifth of a second); beyond, one epoch is scaled up
EXACT_ROWS = 100_000
MOST_SHAPES = 2_000
REMEMBERED = 16  # of at most 20,000 rows: 1 to 2 MB each


def batching_of(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in BATCHING)


def config_of(batching: tuple[Any, ...]) -> RunConfig:
    return replace(RunConfig(), **dict(zip(BATCHING, batching, strict=True)))


def count_steps(found: Lengths, config: RunConfig) -> tuple[int, int, bool]:
    """Optimizer steps and their tokens, and whether they were planned one by one (of much data they
    are scaled up).
    """
    return counted(
        tuple(found.kept(config.max_length)),
        found.factor,
        batching_of(replace(config, micro_batch_splits=1)),
    )


@lru_cache(REMEMBERED)
def counted(
    kept: tuple[int, ...], factor: float, batching: tuple[Any, ...]
) -> tuple[int, int, bool]:
    config = config_of(batching)
    if not kept:
        return 0, 0, True
    steps_once = plan_steps(kept, replace(config, epochs=1, max_steps=0)).total_steps * factor
    epochs = config.max_steps / steps_once if config.max_steps else float(config.epochs)
    if factor > 1 or len(kept) * max(1.0, epochs) > EXACT_ROWS:
        return (
            config.max_steps or round(steps_once * epochs),
            int(sum(kept) * factor * epochs),
            False,
        )
    plan = plan_steps(kept, config)
    tokens = sum(
        get_sequence_length(packed, kept) for step in plan.steps for batch in step for packed in batch
    )
    return plan.total_steps, tokens, True


def shapes_of(found: Lengths | None, config: RunConfig) -> list[BatchShape]:
    """Every batch that one epoch makes; of data that nobody has measured, the largest that the
    settings allow.
    """
    if found is None or not found.measured:
        rows = (
            config.per_device_train_batch_size
            if config.batch_unit == "rows"
            else max(1, config.max_tokens_per_batch // config.max_length)
        )
        rows = -(-rows // config.micro_batch_splits)
        return [BatchShape(rows, config.max_length, rows * config.max_length)]
    kept = found.kept(config.max_length)
    trained = trained_within(found, config.max_length)[found.first < config.max_length].tolist()
    once = replace(config, epochs=1, max_steps=0, gradient_accumulation_steps=1)
    return list(drawn(tuple(kept), tuple(trained), batching_of(once)))


@lru_cache(REMEMBERED)
def drawn(
    kept: tuple[int, ...], trained: tuple[int, ...], batching: tuple[Any, ...]
) -> list[BatchShape]:
    config = config_of(batching)
    made = {
        BatchShape(
            len(batch),
            max(get_sequence_length(packed, kept) for packed in batch),
            sum(trained[row] for packed in batch for row in packed),
        )
        for whole in build_epoch_batches(kept, config, 0)
        for batch in split_batch(whole, config.micro_batch_splits)
    }
    return sorted(made, key=lambda s: -s.rows * s.length)[:MOST_SHAPES] or [
        BatchShape(1, config.max_length, config.max_length)
    ]
