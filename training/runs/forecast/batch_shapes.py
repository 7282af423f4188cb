"""Count the steps of a run and list the shapes of its batches, with the engine's own batching code.

Batching 2,322 rows takes 2 ms per epoch, and one update of the launch page needs a dozen epochs.
Most settings do not change the batches, so the last results are cached.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from training.engine.batches import (
    build_epoch_batches,
    get_sequence_length,
    plan_steps,
    split_batch,
)
from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape
from training.runs.forecast.token_lengths import TokenLengths, count_trained_within

# The settings that decide which rows are batched together, and for how many steps.
BATCH_SETTINGS = (
    "epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "batch_unit",
    "per_device_train_batch_size",
    "max_tokens_per_batch",
    "micro_batch_splits",
    "packing",
    "max_length",
    "seed",
)
# Up to this many rows x epochs, steps are planned exactly (0.2 s); above, one epoch is scaled up.
MAX_EXACT_ROWS = 100_000
MAX_SHAPES = 2_000
CACHE_SIZE = 16  # results; 1 to 2 MB each for 20,000 rows


def get_batch_settings(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in BATCH_SETTINGS)


def build_batch_config(batch_settings: tuple[Any, ...]) -> RunConfig:
    return replace(RunConfig(), **dict(zip(BATCH_SETTINGS, batch_settings, strict=True)))


def count_steps(lengths: TokenLengths, config: RunConfig) -> tuple[int, int, bool]:
    """Optimizer steps, their tokens, and whether both are exact. For large data they are scaled up
    from one epoch.
    """
    return count_steps_cached(
        tuple(lengths.truncate_lengths(config.max_length)),
        lengths.sample_scale,
        get_batch_settings(replace(config, micro_batch_splits=1)),
    )


@lru_cache(CACHE_SIZE)
def count_steps_cached(
    row_lengths: tuple[int, ...], sample_scale: float, batch_settings: tuple[Any, ...]
) -> tuple[int, int, bool]:
    config = build_batch_config(batch_settings)
    if not row_lengths:
        return 0, 0, True
    steps_per_epoch = (
        plan_steps(row_lengths, replace(config, epochs=1, max_steps=0)).total_steps * sample_scale
    )
    epochs = config.max_steps / steps_per_epoch if config.max_steps else float(config.epochs)
    if sample_scale > 1 or len(row_lengths) * max(1.0, epochs) > MAX_EXACT_ROWS:
        return (
            config.max_steps or round(steps_per_epoch * epochs),
            int(sum(row_lengths) * sample_scale * epochs),
            False,
        )
    plan = plan_steps(row_lengths, config)
    tokens = sum(
        get_sequence_length(packed, row_lengths)
        for step in plan.steps
        for batch in step
        for packed in batch
    )
    return plan.total_steps, tokens, True


def get_batch_shapes(lengths: TokenLengths | None, config: RunConfig) -> list[BatchShape]:
    """The distinct batch shapes of one epoch. Without token lengths, the largest shape that the
    settings allow.
    """
    if lengths is None or not lengths.measured_rows:
        rows = (
            config.per_device_train_batch_size
            if config.batch_unit == "rows"
            else max(1, config.max_tokens_per_batch // config.max_length)
        )
        rows = -(-rows // config.micro_batch_splits)
        return [BatchShape(rows, config.max_length, rows * config.max_length)]
    row_lengths = lengths.truncate_lengths(config.max_length)
    trained_tokens = count_trained_within(lengths, config.max_length)[
        lengths.first_trained < config.max_length
    ].tolist()
    one_epoch = replace(config, epochs=1, max_steps=0, gradient_accumulation_steps=1)
    return list(
        compute_shapes_cached(
            tuple(row_lengths), tuple(trained_tokens), get_batch_settings(one_epoch)
        )
    )


@lru_cache(CACHE_SIZE)
def compute_shapes_cached(
    row_lengths: tuple[int, ...], trained_tokens: tuple[int, ...], batch_settings: tuple[Any, ...]
) -> list[BatchShape]:
    config = build_batch_config(batch_settings)
    shapes = {
        BatchShape(
            len(batch),
            max(get_sequence_length(packed, row_lengths) for packed in batch),
            sum(trained_tokens[row] for packed in batch for row in packed),
        )
        for full_batch in build_epoch_batches(row_lengths, config, 0)
        for batch in split_batch(full_batch, config.micro_batch_splits)
    }
    return sorted(shapes, key=lambda s: -s.rows * s.length)[:MAX_SHAPES] or [
        BatchShape(1, config.max_length, config.max_length)
    ]
