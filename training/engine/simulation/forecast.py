"""`python -m training.engine.simulation.forecast`: fit memory estimators of runs, without weights.

It reads one JSON request per line and writes one JSON response per line. A request is {"model":
folder of a config.json, "settings": of a run, "device": "cpu", "cpu_fp32" (no bf16 support) or
"cuda"}. The response is an estimator in the format of memory_estimator.py, or {"error": message}.
The process waits for more requests until it is idle for IDLE_TIMEOUT seconds: imports take 5 s, an
estimator another 5 s.
"""

from __future__ import annotations

import json
import os
import select
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.child_process import emit_message
from training.engine.fast_imports import fast_imports
from training.errors import UserError

with fast_imports():
    import torch

    from training.engine.config import RunConfig
    from training.engine.memory_estimator import (
        SAMPLE_DEPTHS,
        SAMPLE_SHAPES,
        SAMPLE_SIZES,
        SHAPES_PER_CORNER,
        BatchShape,
        MemoryEstimator,
        Sample,
        fit_least_squares,
        get_scaling_setting,
    )
    from training.engine.modeling.model import choose_precision
    from training.engine.simulation.fake_step import SimulatedStep, load_model_config

IDLE_TIMEOUT = 600  # Seconds; then the process ends and frees its 600 MB


def build_estimator(folder: Path, config: RunConfig, device: str) -> MemoryEstimator:
    """Simulate shallow models of two depths and two sizes and fit an estimator to them.

    Raises:
        UserError: the method or a setting does not work with the model.
    """
    model_config = load_model_config(folder)
    text_config = model_config.get_text_config()
    layers = text_config.num_hidden_layers
    precision, device = (
        choose_precision(config, has_bf16=device != "cpu_fp32"),
        device.removesuffix("_fp32"),
    )
    config = replace(config, optim=config.resolve_optimizer(device), **without_adapter_init(config))
    scaling_name = get_scaling_setting(config, device)
    shapes = sliding_window_shapes(getattr(text_config, "sliding_window", None), config.max_length)
    samples: list[Sample] = []
    metadata: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "optimizer": config.optim,
        "scaling_setting": scaling_name,
    }
    metadata["short_attention"] = (
        get_short_attention_heads(text_config, config)
        if device == "cpu" and precision != "fp32"
        else (0, 0)
    )
    for depth_index in range(2):
        for size_index in range(2 if scaling_name else 1):
            size = SAMPLE_SIZES[size_index] if scaling_name else 0
            overrides: dict[str, Any] = {scaling_name: size} if scaling_name else {}
            sized_config = replace(config, **overrides)
            simulated = SimulatedStep(
                model_config,
                sized_config,
                layers=SAMPLE_DEPTHS[depth_index],
                precision=precision,
                device=device,
            )
            try:
                # The first evaluation has 9 snapshots after its layers, later ones have 12, so the
                # first step is not a sample
                simulated.run_step(shapes[0])
                for shape in shapes[: SHAPES_PER_CORNER[depth_index, size_index]]:
                    samples.append(
                        (SAMPLE_DEPTHS[depth_index], size, shape, simulated.run_step(shape))
                    )
                metadata[f"trainable_{depth_index}{size_index}"], metadata["largest"] = (
                    simulated.num_trainable,
                    simulated.largest_parameter,
                )
            finally:
                simulated.close()
    return fit_least_squares(layers, samples, metadata)


def get_short_attention_heads(text_config: Any, config: RunConfig) -> tuple[int, int]:
    """Number and width of the attention heads if the run uses short_attention.py, zeros if it uses
    torch's kernel.
    """
    dropout = getattr(text_config, "attention_dropout", 0.0) or getattr(
        text_config, "attn_pdrop", 0.0
    )
    if config.packing or config.method == "prefix" or dropout:
        return 0, 0
    return text_config.num_attention_heads, getattr(
        text_config, "head_dim", None
    ) or text_config.hidden_size // text_config.num_attention_heads


def without_adapter_init(config: RunConfig) -> dict[str, Any]:
    """Settings that replace data-driven initialization by the default one. Initialization needs
    weights, which a simulation does not have, and does not change the memory of a step.
    """
    settings: dict[str, Any] = {"init_lora_weights": "default"}
    return settings | ({"prompt_tuning_init": "random"} if config.method == "prompt" else {})


def sliding_window_shapes(window: int | None, max_length: int) -> tuple[BatchShape, ...]:
    """Shapes of the batches to simulate. Rows longer than a sliding window need a mask and shorter
    ones do not, so all shapes are on the same side of the window as the run's rows.
    """
    longest = max(shape.length for shape in SAMPLE_SHAPES)
    if not window or (max_length <= window and longest <= window):
        return SAMPLE_SHAPES
    if max_length > window:
        return tuple(BatchShape(s.rows, s.length + window, s.trained_tokens) for s in SAMPLE_SHAPES)
    return tuple(
        BatchShape(s.rows, max(4, s.length * window // longest), s.trained_tokens)
        for s in SAMPLE_SHAPES
    )


def handle_request(line: str) -> dict[str, Any]:
    request = json.loads(line)
    try:
        config = RunConfig.from_dict(request["settings"])
        return build_estimator(Path(request["model"]), config, request["device"]).to_json()
    except UserError as error:
        return {"error": error.message, "field": error.field}
    except (OSError, MemoryError) as error:
        # A temporary condition of the machine, so the caller must not cache this response
        return {
            "error": f"The memory simulation failed ({type(error).__name__}). Try again.",
            "field": "",
            "is_transient": True,
        }
    # An architecture that cannot be simulated becomes an error message on the page
    except Exception as error:  # noqa: BLE001
        return {
            "error": "Memory cannot be forecast for this model "
            f"({type(error).__name__}: {str(error)[:200]}).",
            "field": "model",
        }


def main() -> None:
    torch.set_num_threads(1)
    os.nice(5)  # Training has priority
    while select.select([sys.stdin], [], [], IDLE_TIMEOUT)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        emit_message(**handle_request(line))


if __name__ == "__main__":
    main()
