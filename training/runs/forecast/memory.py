"""What a run will take of a device's memory, told before it starts: from a memory law and the
batches that its data makes.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from training.catalog.models import BaseModel
from training.engine.config import RunConfig
from training.engine.memory_estimator import SAMPLE_DEPTHS, SAMPLE_SIZES, MemoryEstimator, find_peak_memory, get_scaling_value
from training.runs.forecast.batch_shapes import shapes_of
from training.runs.forecast.memory_estimators import kept_law
from training.runs.forecast.target_device import Target
from training.runs.forecast.token_lengths import Lengths
from training.runs.models import Run
from training.runs.states import State

# Before any run has been measured on a kind of device: Python with torch, transformers and PEFT on
# a CPU (a guess); on CUDA the workspaces of cuBLAS (measured on an H200).
FRAMEWORK_BYTES = {"cpu": 900_000_000, "cpu_fp32": 900_000_000, "cuda": 68_157_440}
# What CUDA takes of a card beside its allocator, which measures a run: an H200's, until a run has
# shown it on the card itself.
CONTEXT_BYTES = {"cpu": 0, "cpu_fp32": 0, "cuda": 735_000_000}
LEARNED_FROM = 20  # runs


class Constant(NamedTuple):
    """The bytes that no setting moves: of the framework, and of CUDA's context."""

    framework: int
    context: int


def constant_part(target: Target) -> Constant:
    """Framework: what past runs on this kind of device took beyond their forecast's other parts.
    Context: see `worker/memory_guard.py`.
    """
    past = Run.objects.filter(
        state=State.FINISHED, forecast__device=target.name, peak_memory_bytes__gt=0
    ).order_by("-pk")
    told = past.values_list("peak_memory_bytes", "forecast")[:LEARNED_FROM]
    # Paged states are memory of the driver's, which the allocator does not count: such a run would
    # teach too little.
    found = [
        measured - forecast["variable"]
        for measured, forecast in told
        if not forecast.get("optimizer", "").startswith("paged")
    ]
    framework = max(0, int(statistics.median(found))) if found else FRAMEWORK_BYTES[target.kind]
    return Constant(
        framework, CONTEXT_BYTES[target.kind] if target.context is None else target.context
    )


def memory_forecast(
    law: MemoryEstimator, config: RunConfig, found: Lengths | None, constant: Constant
) -> dict[str, Any]:
    """Bytes at the fullest moment of training by kind, and at load and measuring; for the batch
    that takes most.
    """
    trainable, config = law_trainable(law, config), config.memory_upper_bound()
    shapes = shapes_of(found, config)
    step = find_peak_memory(law, shapes, config)
    measuring = find_peak_memory(law, shapes, config, is_eval=True)
    kinds = {name: int(value) for name, value in step.kinds.items()}
    framework, context = constant
    variable = sum(kinds.values())
    # While it is loaded, one tensor is there twice.
    load = kinds["weights"] + 2 * int(law.metadata["largest"])
    measurable = max(variable, int(measuring.total), load) + framework
    return {
        "kinds": kinds | {"framework": framework + context},
        "variable": variable,
        "context": context,
        "step": variable + framework + context,
        "eval": int(measuring.total) + framework + context,
        "load": load + framework + context,
        "measurable": measurable,  # what the run will measure of it
        "peak": measurable + context,
        "phase": step.phase,
        "batch": [step.shape.rows, step.shape.length],
        "trainable": trainable,
        "precision": law.metadata["precision"],
        "optimizer": law.metadata["optimizer"],
    }


def law_trainable(law: MemoryEstimator, config: RunConfig) -> int:
    """Trained parameters, affine in layers and size as the law's samples have them."""
    facts, name = law.metadata, law.metadata["scaling_setting"]
    share = (get_scaling_value(law, config) - SAMPLE_SIZES[0]) / (SAMPLE_SIZES[1] - SAMPLE_SIZES[0]) if name else 0.0
    at = []
    for depth in (0, 1):
        small, large = (
            float(facts.get(f"trainable_{depth}{sized}", facts[f"trainable_{depth}0"]))
            for sized in (0, 1)
        )
        at.append(small + share * (large - small))
    return round(at[0] + (law.layers - SAMPLE_DEPTHS[0]) * (at[1] - at[0]) / (SAMPLE_DEPTHS[1] - SAMPLE_DEPTHS[0]))


def forecast_on(
    target: Target, law: MemoryEstimator, config: RunConfig, found: Lengths | None
) -> dict[str, Any]:
    """What `memory_forecast` says of a device, with what past runs there took; the device's name is
    kept with it.
    """
    return memory_forecast(law, config, found, constant_part(target)) | {"device": target.name}


def kept_forecast(
    config: RunConfig, model: BaseModel, found: Lengths | None, target: Target
) -> dict[str, Any] | None:
    """The forecast, if its law has been made.

    Raises:
        UserError: it cannot be made.
    """
    law = kept_law(model.folder, config, target.kind)
    return None if law is None else forecast_on(target, law, config, found)
