"""The memory forecast against the allocator's own log of real steps: techniques x architectures x
dtype x checkpointing x optimizer.

On a CPU the log is the profiler's (every allocation and release of the step), on CUDA
`max_memory_allocated`. The forecast comes from shallow fake models as on the launch page; the real
model has other depth and batches. `--smollm FOLDER` adds real weights.
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

from benchmarks import law_device, report
from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape, find_peak_memory
from training.engine.methods import METHODS
from training.engine.modeling.model import (
    LabeledPositionsHead,
    compute_in_bf16,
    load_base,
    set_deterministic,
    resolve_device,
    resolve_precision,
    get_weights_dtype,
    wrap_base_model,
)
from training.engine.modeling.optimizers import make_optimizer, get_parameters
from training.engine.simulation.forecast import law_of

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# Of cuBLAS and cuBLASLt on an H200, the first things that its allocator holds
CUBLAS_WORKSPACES = 68_157_440
BATCHES = (BatchShape(3, 160, 200), BatchShape(1, 700, 350), BatchShape(8, 64, 128))
TECHNIQUES = tuple(METHODS)


def make_models(root: Path) -> dict[str, Path]:
    """One small random model of each family, saved as a folder."""
    import transformers as t

    gpt2 = t.GPT2Config(vocab_size=4096, n_embd=256, n_layer=6, n_head=8, n_positions=2048)
    made = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        "qwen3": t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=32)),
        "gemma3": t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=1024)
        ),
        "mistral": t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=None)),
        "gpt2": t.GPT2LMHeadModel(gpt2),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def cells(quick: bool) -> list[tuple[str, RunConfig, BatchShape]]:
    """Every technique on every architecture with every precision, optimizer and checkpointing;
    accumulation and batch are drawn.

    `quick`: one draw of each technique and architecture. Besides, settings that change what a step
    is made of.
    """
    draw, made = random.Random(0), []
    for family in ("llama", "qwen3", "gemma3", "mistral", "gpt2"):
        for method in TECHNIQUES:
            precisions = ("fp32", "mixed" if METHODS[method].is_full_finetuning else "bf16")
            checkpointing = (
                (False,) if "gradient_checkpointing" in METHODS[method].incompatible_settings else (False, True)
            )
            product = list(itertools.product(precisions, ("adamw_torch", "adamw_8bit"), checkpointing))
            for precision, optimizer, again in (
                [(precisions[1], *draw.choice(product)[1:])] if quick else product
            ):
                settings = {
                    "precision": precision,
                    "optim": optimizer,
                    "gradient_checkpointing": again,
                }
                made.append(cell(family, method, draw, **settings))
    if not quick:
        for family in ("llama", "gpt2"):
            made += [cell(family, "lora", draw, dropout=0.1), cell(family, "lora", draw, use_dora=True)]
            made.append(cell(family, "prefix", draw, prefix_projection=True))
    return made


def cell(
    family: str, method: str, draw: random.Random, **settings: Any
) -> tuple[str, RunConfig, BatchShape]:
    start = {"prompt_tuning_init": "random"} if method == "prompt" else {}
    config = RunConfig.from_dict(
        {"method": method, "gradient_accumulation_steps": draw.choice((1, 2)), **start, **settings}
    )
    return family, config, draw.choice(BATCHES)


def forecast(folder: Path, config: RunConfig, shape: BatchShape, device: torch.device) -> float:
    law = law_of(folder, config, law_device(device))
    return find_peak_memory(law, [shape], config).total + (CUBLAS_WORKSPACES if device.type == "cuda" else 0)


def measure(folder: Path, config: RunConfig, shape: BatchShape, device: torch.device) -> float:
    """Bytes alive at the peak of the second optimizer step of a real run."""
    set_deterministic(config, device)
    precision = resolve_precision(config, device)
    base = load_base(
        folder, get_weights_dtype(precision), device, quantized=METHODS[config.method].has_quantized_base
    )
    model = wrap_base_model(base, replace(config, model=str(folder)))
    if precision == "mixed":
        compute_in_bf16(model, device)
    head, optimizer = LabeledPositionsHead(model), make_optimizer(model, config, device)
    ids = torch.randint(
        0, base.config.get_text_config().vocab_size, (shape.rows, shape.length), device=device
    )
    places = torch.randperm(shape.rows * shape.length, device=device)[: shape.trained_tokens].sort().values
    targets = ids.flatten()[places]

    def step() -> None:
        for _ in range(config.gradient_accumulation_steps):
            head.compute_loss_at_positions(model.train(), ids, places, targets, None).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(get_parameters(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated())
    held = [*model.parameters(), *model.buffers(), *state_tensors(optimizer), ids, places, targets]
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
    return float(before + peak_of_log(step))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        v
        for state in optimizer.state.values()
        for k, v in state.items()
        if isinstance(v, torch.Tensor) and "qmap" not in k
    ]


def peak_of_log(step: Any) -> int:
    """The most that the CPU allocator had given out, beyond what it had at the start, while `step`
    ran.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as log:
        step()
    assert log.kineto_results is not None
    events = [
        e
        for e in log.kineto_results.events()
        if e.name() == "[memory]" and e.device_type().name == "CPU"
    ]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and worst error of each technique on each architecture, in per cent, as
    docs/benchmarks.md has it.
    """
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = [f"| technique | {' | '.join(families)} |", f"|{'---|' * (len(families) + 1)}"]
    for method in TECHNIQUES:
        line = [method]
        for family in families:
            mine = [row for row in rows if (row["family"], row["method"]) == (family, method)]
            errors = [100 * (row["forecast"] / row["measured"] - 1) for row in mine]
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
        wanted = cells(arguments.quick)
        if arguments.smollm:
            folders["smollm2-135m"] = arguments.smollm
            usual = [
                RunConfig.from_dict(
                    {"method": m} | ({"prompt_tuning_init": "random"} if m == "prompt" else {})
                )
                for m in TECHNIQUES
            ]
            wanted += [("smollm2-135m", config, BatchShape(4, 256, 300)) for config in usual]
        for family, config, shape in wanted:
            if arguments.only and arguments.only not in f"{family} {config.method}":
                continue
            told = forecast(folders[family], config, shape, device)
            real = measure(folders[family], config, shape, device)
            gc.collect()
            rows.append(
                {
                    "cell": cell_name(family, config, shape),
                    "family": family,
                    "method": config.method,
                    "forecast": told,
                    "measured": real,
                }
            )
            error = told / real - 1
            sys.stderr.write(
                f"{rows[-1]['cell']:70s} {told / 1e6:9.1f} {real / 1e6:9.1f} MB "
                f"{100 * error:+.2f} %\n"
            )
    errors = [abs(row["forecast"] / row["measured"] - 1) for row in rows]
    if not arguments.json:
        sys.stdout.write(table(rows))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report(
        {
            "mean_error": round(sum(errors) / len(errors), 5),
            "worst_error": round(max(errors), 5),
            "cells": len(rows),
            "device": name,
        }
    )


if __name__ == "__main__":
    main()
