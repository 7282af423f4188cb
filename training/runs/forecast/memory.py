"""Forecast the device memory of a run before it starts, from a memory estimator and the shapes of
its batches.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from training.catalog.models import BaseModel
from training.engine.config import RunConfig
from training.engine.memory_estimator import (
    SAMPLE_DEPTHS,
    SAMPLE_SIZES,
    MemoryEstimator,
    find_peak_memory,
    get_scaling_value,
)
from training.runs.forecast.batch_shapes import get_batch_shapes
from training.runs.forecast.memory_estimators import get_cached_estimator
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import TokenLengths
from training.runs.models import Run
from training.runs.states import State

# Used until a run has been measured on a device: on a CPU, Python with torch, transformers and PEFT
# (a guess); on CUDA, the workspaces of cuBLAS (measured on an H200).
FRAMEWORK_BYTES = {"cpu": 900_000_000, "cpu_fp32": 900_000_000, "cuda": 68_157_440}
# Memory of the CUDA context, which PyTorch's allocator does not count. Measured on an H200; used
# until a run has measured it on the device itself.
CONTEXT_BYTES = {"cpu": 0, "cpu_fp32": 0, "cuda": 735_000_000}
MAX_PAST_RUNS = 20


class FixedOverhead(NamedTuple):
    """Bytes that no setting changes: those of the framework and those of the CUDA context."""

    framework: int
    context: int


def get_fixed_overhead(target: TargetDevice) -> FixedOverhead:
    """The overhead on this device. `framework` is the median of what past runs measured beyond the
    variable part of their forecast. For `context` see `worker/memory_guard.py`.
    """
    past_runs = Run.objects.filter(
        state=State.FINISHED, forecast__device=target.name, peak_memory_bytes__gt=0
    ).order_by("-pk")
    measurements = past_runs.values_list("peak_memory_bytes", "forecast")[:MAX_PAST_RUNS]
    # Paged optimizer states are driver memory that the allocator does not count. Runs that use them
    # would lower the median.
    overheads = [
        measured - forecast["variable"]
        for measured, forecast in measurements
        if not forecast.get("optimizer", "").startswith("paged")
    ]
    framework = (
        max(0, int(statistics.median(overheads))) if overheads else FRAMEWORK_BYTES[target.kind]
    )
    return FixedOverhead(
        framework,
        CONTEXT_BYTES[target.kind] if target.context_bytes is None else target.context_bytes,
    )


def forecast_memory(
    estimator: MemoryEstimator,
    config: RunConfig,
    lengths: TokenLengths | None,
    overhead: FixedOverhead,
) -> dict[str, Any]:
    """Peak bytes while loading, training and evaluating, for the batch that needs the most; `kinds`
    splits the training peak by kind.
    """
    trainable, config = (
        estimate_trainable_parameters(estimator, config),
        config.to_memory_upper_bound(),
    )
    shapes = get_batch_shapes(lengths, config)
    train_peak = find_peak_memory(estimator, shapes, config)
    eval_peak = find_peak_memory(estimator, shapes, config, is_eval=True)
    kinds = {name: int(value) for name, value in train_peak.kinds.items()}
    framework, context = overhead
    variable = sum(kinds.values())
    # While the model is loaded, its largest tensor exists twice.
    load = kinds["weights"] + 2 * int(estimator.metadata["largest"])
    allocated_peak = max(variable, int(eval_peak.total), load) + framework
    return {
        "kinds": kinds | {"framework": framework + context},
        "variable": variable,
        "context": context,
        "step": variable + framework + context,
        "eval": int(eval_peak.total) + framework + context,
        "load": load + framework + context,
        "allocated_peak": allocated_peak,  # the part of `peak` that the run measures
        "peak": allocated_peak + context,
        "phase": train_peak.phase,
        "batch": [train_peak.shape.rows, train_peak.shape.length],
        "trainable": trainable,
        "precision": estimator.metadata["precision"],
        "optimizer": estimator.metadata["optimizer"],
    }


def estimate_trainable_parameters(estimator: MemoryEstimator, config: RunConfig) -> int:
    """Trainable parameters, interpolated linearly in layers and size from the samples."""
    metadata = estimator.metadata
    name = metadata["scaling_setting"]
    fraction = (
        (get_scaling_value(estimator, config) - SAMPLE_SIZES[0])
        / (SAMPLE_SIZES[1] - SAMPLE_SIZES[0])
        if name
        else 0.0
    )
    by_depth = []
    for depth in (0, 1):
        small, large = (
            float(metadata.get(f"trainable_{depth}{size}", metadata[f"trainable_{depth}0"]))
            for size in (0, 1)
        )
        by_depth.append(small + fraction * (large - small))
    return round(
        by_depth[0]
        + (estimator.layers - SAMPLE_DEPTHS[0])
        * (by_depth[1] - by_depth[0])
        / (SAMPLE_DEPTHS[1] - SAMPLE_DEPTHS[0])
    )


def forecast_for_device(
    target: TargetDevice,
    estimator: MemoryEstimator,
    config: RunConfig,
    lengths: TokenLengths | None,
) -> dict[str, Any]:
    """The memory forecast with the overhead of this device, and the device's name."""
    return forecast_memory(estimator, config, lengths, get_fixed_overhead(target)) | {
        "device": target.name
    }


def get_cached_forecast(
    config: RunConfig, model: BaseModel, lengths: TokenLengths | None, target: TargetDevice
) -> dict[str, Any] | None:
    """The forecast if its memory estimator is cached, else None.

    Raises:
        CannotEstimate: this configuration cannot be simulated.
    """
    estimator = get_cached_estimator(model.folder, config, target.kind)
    return None if estimator is None else forecast_for_device(target, estimator, config, lengths)
