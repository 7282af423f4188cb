"""Compare the memory forecast with measured steps: methods x architectures x dtypes x
checkpointing x optimizers.

On a CPU the measurement is the profiler's log of every allocation and release, on CUDA it is
`max_memory_allocated`. The forecast comes from shallow fake models as on the launch page; the
measured model has a different depth and different batches. `--smollm FOLDER` adds real weights.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from benchmarks import estimator_device, print_report
from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape, find_peak_memory
from training.engine.methods import METHODS
from training.engine.modeling.model import (
    LabeledPositionsHead,
    compute_in_bf16,
    get_weights_dtype,
    load_base,
    resolve_device,
    resolve_precision,
    set_deterministic,
    wrap_base_model,
)
from training.engine.modeling.optimizers import get_parameters, make_optimizer
from training.engine.simulation.forecast import build_estimator

MODEL_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# Bytes that cuBLAS and cuBLASLt allocate on an H200 before anything else
CUBLAS_WORKSPACES = 68_157_440
BATCHES = (BatchShape(3, 160, 200), BatchShape(1, 700, 350), BatchShape(8, 64, 128))
METHOD_NAMES = tuple(METHODS)


def make_models(root: Path) -> dict[str, Path]:
    """One small random model of each family, saved as a folder."""
    import transformers as t

    gpt2 = t.GPT2Config(vocab_size=4096, n_embd=256, n_layer=6, n_head=8, n_positions=2048)
    models = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**MODEL_SIZES)),
        "qwen3": t.Qwen3ForCausalLM(t.Qwen3Config(**MODEL_SIZES, head_dim=32)),
        "gemma3": t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**MODEL_SIZES, head_dim=32, sliding_window=1024)
        ),
        "mistral": t.MistralForCausalLM(t.MistralConfig(**MODEL_SIZES, sliding_window=None)),
        "gpt2": t.GPT2LMHeadModel(gpt2),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def list_cells(is_quick: bool) -> list[tuple[str, RunConfig, BatchShape]]:
    """Every method on every architecture with every precision, optimizer and checkpointing, and
    random accumulation and batch. Some cells have settings that change the operations of a step.

    With `is_quick` there is one random cell per method and architecture.
    """
    rng, drawn = random.Random(0), []
    for family in ("llama", "qwen3", "gemma3", "mistral", "gpt2"):
        for method in METHOD_NAMES:
            precisions = ("fp32", "mixed" if METHODS[method].is_full_finetuning else "bf16")
            checkpointing = (
                (False,)
                if "gradient_checkpointing" in METHODS[method].incompatible_settings
                else (False, True)
            )
            product = list(
                itertools.product(precisions, ("adamw_torch", "adamw_8bit"), checkpointing)
            )
            for precision, optimizer, is_checkpointing in (
                [(precisions[1], *rng.choice(product)[1:])] if is_quick else product
            ):
                settings = {
                    "precision": precision,
                    "optim": optimizer,
                    "gradient_checkpointing": is_checkpointing,
                }
                drawn.append(draw_cell(family, method, rng, **settings))
    if not is_quick:
        for family in ("llama", "gpt2"):
            drawn += [
                draw_cell(family, "lora", rng, dropout=0.1),
                draw_cell(family, "lora", rng, use_dora=True),
            ]
            drawn.append(draw_cell(family, "prefix", rng, prefix_projection=True))
    return drawn


def draw_cell(
    family: str, method: str, rng: random.Random, **settings: Any
) -> tuple[str, RunConfig, BatchShape]:
    init_settings = {"prompt_tuning_init": "random"} if method == "prompt" else {}
    config = RunConfig.from_dict(
        {
            "method": method,
            "gradient_accumulation_steps": rng.choice((1, 2)),
            **init_settings,
            **settings,
        }
    )
    return family, config, rng.choice(BATCHES)


def forecast_bytes(
    folder: Path, config: RunConfig, shape: BatchShape, device: torch.device
) -> float:
    estimator = build_estimator(folder, config, estimator_device(device))
    return find_peak_memory(estimator, [shape], config).total + (
        CUBLAS_WORKSPACES if device.type == "cuda" else 0
    )


def measure_peak(folder: Path, config: RunConfig, shape: BatchShape, device: torch.device) -> float:
    """Peak of the live bytes in the second optimizer step of a real model."""
    set_deterministic(config, device)
    precision = resolve_precision(config, device)
    base = load_base(
        folder,
        get_weights_dtype(precision),
        device,
        quantized=METHODS[config.method].has_quantized_base,
    )
    model = wrap_base_model(base, replace(config, model=str(folder)))
    if precision == "mixed":
        compute_in_bf16(model, device)
    head, optimizer = LabeledPositionsHead(model), make_optimizer(model, config, device)
    ids = torch.randint(
        0, base.config.get_text_config().vocab_size, (shape.rows, shape.length), device=device
    )
    positions = (
        torch.randperm(shape.rows * shape.length, device=device)[: shape.trained_tokens]
        .sort()
        .values
    )
    targets = ids.flatten()[positions]

    def run_step() -> None:
        for _ in range(config.gradient_accumulation_steps):
            loss = head.compute_loss_at_positions(model.train(), ids, positions, targets, None)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(get_parameters(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run_step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run_step()
        return float(torch.cuda.max_memory_allocated())
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *get_state_tensors(optimizer),
        ids,
        positions,
        targets,
    ]
    before = sum(
        {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()
    )
    return float(before + measure_allocator_peak(run_step))


def get_state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        v
        for state in optimizer.state.values()
        for k, v in state.items()
        if isinstance(v, torch.Tensor) and "qmap" not in k
    ]


def measure_allocator_peak(run_step: Any) -> int:
    """Peak of the bytes allocated on the CPU while `run_step` runs, relative to its start."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run_step()
    assert profile.kineto_results is not None
    events = [
        e
        for e in profile.kineto_results.events()
        if e.name() == "[memory]" and e.device_type().name == "CPU"
    ]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def format_table(rows: list[dict[str, Any]]) -> str:
    """Mean and worst error of each method on each architecture in percent, as a Markdown table
    for docs/benchmarks.md.
    """
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = [f"| method | {' | '.join(families)} |", f"|{'---|' * (len(families) + 1)}"]
    for method in METHOD_NAMES:
        line = [method]
        for family in families:
            method_rows = [
                row for row in rows if (row["family"], row["method"]) == (family, method)
            ]
            errors = [100 * (row["forecast"] / row["measured"] - 1) for row in method_rows]
            worst = max(errors, key=abs, default=0.0)
            line.append(
                f"{sum(map(abs, errors)) / len(errors):.2f}, {worst:+.1f}" if errors else ""
            )
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def cell_name(family: str, config: RunConfig, shape: BatchShape) -> str:
    choices = (
        f"{config.precision} {config.optim} gc={config.gradient_checkpointing:d} "
        f"acc={config.gradient_accumulation_steps}"
    )
    for name in ("dropout", "use_dora", "prefix_projection"):
        if getattr(config, name):
            choices += f" {name}"
    return f"{family} {config.method} {choices} {shape.rows}x{shape.length}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--smollm", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    device = resolve_device()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        torch.manual_seed(0)
        folders = make_models(Path(root))
        selected_cells = list_cells(arguments.quick)
        if arguments.smollm:
            folders["smollm2-135m"] = arguments.smollm
            default_configs = [
                RunConfig.from_dict(
                    {"method": m} | ({"prompt_tuning_init": "random"} if m == "prompt" else {})
                )
                for m in METHOD_NAMES
            ]
            selected_cells += [
                ("smollm2-135m", config, BatchShape(4, 256, 300)) for config in default_configs
            ]
        for family, config, shape in selected_cells:
            if arguments.only and arguments.only not in f"{family} {config.method}":
                continue
            predicted = forecast_bytes(folders[family], config, shape, device)
            measured = measure_peak(folders[family], config, shape, device)
            gc.collect()
            rows.append(
                {
                    "cell": cell_name(family, config, shape),
                    "family": family,
                    "method": config.method,
                    "forecast": predicted,
                    "measured": measured,
                }
            )
            error = predicted / measured - 1
            sys.stderr.write(
                f"{rows[-1]['cell']:70s} {predicted / 1e6:9.1f} {measured / 1e6:9.1f} MB "
                f"{100 * error:+.2f}%\n"
            )
    errors = [abs(row["forecast"] / row["measured"] - 1) for row in rows]
    if not arguments.json:
        sys.stdout.write(format_table(rows))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print_report(
        {
            "mean_error": round(sum(errors) / len(errors), 5),
            "worst_error": round(max(errors), 5),
            "cells": len(rows),
            "device": name,
        }
    )


if __name__ == "__main__":
    main()
