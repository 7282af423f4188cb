"""Compare the speed of SnapML's engine with TRL's SFTTrainer: same model, rows, LoRA (rank 16 on
all linear layers), effective batch size 8 and number of steps.

Each arm runs in its own process: SnapML, TRL with default settings, and TRL with its best settings
(no gradient checkpointing, bf16 if the hardware supports it, the same batches with rows of similar
length, and the same initial weights, so that held-out losses are comparable). `--trl-python` is the
Python of an environment with trl, `--model` the folder of a model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXAMPLE = ROOT / "training/datasets/example_files/smart_home.jsonl"
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, EVAL_ROWS = 8, 2e-4, 2, 100


def load_encoded_rows(folder: Path, split: str) -> list[Any]:
    from training.engine.data.conversations import encode_row, load_tokenizer, read_rows

    tokenizer = load_tokenizer(folder)
    return [
        encode_row(tokenizer, row, max_length=512)
        for row in read_rows(EXAMPLE)
        if row["split"] == split
    ]


def eval_loss(model: Any, folder: Path, rows: list[Any]) -> float:
    """Nats per trained token over held-out rows, computed the same way for every arm."""
    import torch

    from training.engine.modeling.model import LabeledPositionsHead
    from training.engine.train.evaluate import collate

    head, total = LabeledPositionsHead(model), 0.0
    device = next(model.parameters()).device
    with torch.no_grad():
        for index in range(len(rows)):
            total += head.compute_loss_sum(
                model.eval(), *collate([(index,)], rows, 0, device)
            ).item()
    return float(total / sum(row.trained_tokens for row in rows))


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronized_time() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def base_settings(steps: int) -> dict[str, Any]:
    return {
        "batch_unit": "rows",
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "max_steps": steps,
    }


def order_rows(rows: list[Any], steps: int) -> list[Any]:
    """The rows in the order in which the engine trains them."""
    from training.engine.batches import plan_steps
    from training.engine.config import RunConfig

    plan = plan_steps([len(row) for row in rows], RunConfig.from_dict(base_settings(steps)))
    return [
        rows[index] for step in plan.steps for batch in step for packed in batch for index in packed
    ]


def measure_snapml(folder: Path, steps: int) -> dict[str, Any]:
    """Run the engine on a run folder, including journal and memory readings, but without
    evaluations and checkpoints before the end.
    """
    from training.engine.__main__ import main as engine

    run_dir = Path(tempfile.mkdtemp(prefix="snapml-speed-")) / "run"
    run_dir.mkdir()
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    for name in ("train", "heldout"):
        split_lines = [
            line for line in lines if line["split"] == ("train" if name == "train" else "test")
        ] or lines[:EVAL_ROWS]
        (run_dir / f"{name}.jsonl").write_text("\n".join(map(json.dumps, split_lines)))
    settings = base_settings(steps) | {
        "model": str(folder),
        "train_data": str(run_dir / "train.jsonl"),
        "eval_data": str(run_dir / "heldout.jsonl"),
        "eval_steps": 10**6,
        "eval_rows": 1,
        "save_steps": 10**6,
        "export_checkpoint": "last",
    }
    (run_dir / "config.json").write_text(json.dumps(settings))
    assert engine([str(run_dir)]) == 0
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    step_events = [event for event in events if event["kind"] == "step"]
    started, ended = step_events[WARMUP_STEPS - 1]["time"], step_events[-1]["time"]
    peak = max(event["memory_peak_bytes"] for event in step_events)
    step_seconds = sum(event["seconds"] for event in step_events[WARMUP_STEPS:])

    import torch

    from training.engine.modeling.model import get_fastest_dtype, load_base, resolve_device
    from training.engine.modeling.weights import load_adapter

    device = resolve_device()
    model = load_adapter(
        load_base(folder, get_fastest_dtype(device), device), run_dir / "adapter", "default"
    )
    torch.use_deterministic_algorithms(False)
    return {
        "tokens_per_second": sum(event["tokens"] for event in step_events[WARMUP_STEPS:])
        / (ended - started),
        "peak_bytes": peak,
        "eval_loss": eval_loss(model, folder, load_encoded_rows(folder, "test")[:EVAL_ROWS]),
        "events_share": 1 - step_seconds / (ended - started),
    }


def copy_initial_weights(model: Any, folder: Path, steps: int) -> None:
    """Copy the engine's initial weights to TRL's adapter, so that only the training differs."""
    import torch

    from training.engine.config import RunConfig
    from training.engine.modeling.model import (
        get_fastest_dtype,
        load_base,
        resolve_device,
        wrap_base_model,
    )

    config, device = RunConfig.from_dict(base_settings(steps)), resolve_device()
    torch.manual_seed(config.seed)
    engine_parameters = dict(
        wrap_base_model(
            load_base(folder, get_fastest_dtype(device), device), config
        ).named_parameters()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(engine_parameters[name])


def make_sft_config(steps: int, *, is_best: bool) -> Any:
    import torch
    from trl import SFTConfig

    from training.engine.modeling.model import get_fastest_dtype, resolve_device

    fastest = get_fastest_dtype(resolve_device())
    best_settings = {
        "gradient_checkpointing": False,
        "bf16": fastest is torch.bfloat16,
        "train_sampling_strategy": "sequential",
    }
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        model_init_kwargs={"dtype": fastest} if is_best else None,
        **(best_settings if is_best else {}),
    )


def measure_trl(folder: Path, steps: int, *, is_best: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTTrainer

    from training.engine.data.conversations import load_tokenizer

    rows = load_encoded_rows(folder, "train")
    rows = order_rows(rows, steps) if is_best else rows
    data = Dataset.from_list(
        [{"input_ids": r.ids.tolist(), "labels": r.labels.tolist()} for r in rows]
    )
    trainer = SFTTrainer(
        model=str(folder),
        args=make_sft_config(steps, is_best=is_best),
        train_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    if is_best:
        copy_initial_weights(trainer.model, folder, steps)
    token_times: list[tuple[float, int]] = []
    original_step = trainer.training_step

    def timed_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        token_times.append((synchronized_time(), int(tokens)))
        return original_step(model, inputs, *args, **kwargs)

    trainer.training_step = timed_step
    trainer.train()
    end = synchronized_time()
    return {
        "tokens_per_second": sum(tokens for _, tokens in token_times[WARMUP_STEPS:])
        / (end - token_times[WARMUP_STEPS][0]),
        "peak_bytes": peak_bytes(),
        "eval_loss": eval_loss(
            trainer.model, folder, load_encoded_rows(folder, "test")[:EVAL_ROWS]
        ),
    }


def measure_arm(name: str, folder: Path, steps: int) -> dict[str, Any]:
    return (
        measure_snapml(folder, steps)
        if name == "ours"
        else measure_trl(folder, steps, is_best=name == "trl_best")
    )


def run_arm(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one arm in its own process."""
    from training.child_process import ALLOCATOR_VARIABLES

    python = sys.executable if name == "ours" else arguments.trl_python
    command = [python, "-W", "ignore", __file__, "--arm", name]
    command += ["--model", str(folder), "--steps", str(arguments.steps)]
    # The same environment as for an engine that the site starts
    environment = os.environ | (ALLOCATOR_VARIABLES if name == "ours" else {})
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment
    )
    if process.returncode:
        sys.exit(f"{name} failed:\n{process.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", default="")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--skip", default="", help="an arm that this machine cannot finish in time")
    arguments = parser.parse_args()
    if arguments.arm:
        sys.stdout.write(
            "\n" + json.dumps(measure_arm(arguments.arm, arguments.model, arguments.steps)) + "\n"
        )
        return
    from benchmarks import print_report
    from benchmarks.engine_step import import_builtin_model

    folder = arguments.model or import_builtin_model()
    results: dict[str, dict[str, Any]] = {}
    for name in ("trl_default", "ours", "trl_best"):
        if name == arguments.skip:
            continue
        results[name] = run_arm(name, folder, arguments)
        sys.stderr.write(f"{name}: {results[name]}\n")
    best, snapml = results["trl_best"], results["ours"]
    default = results.get("trl_default")
    print_report(
        {
            "ratio_default": round(snapml["tokens_per_second"] / default["tokens_per_second"], 2)
            if default
            else None,
            "ratio_best": round(snapml["tokens_per_second"] / best["tokens_per_second"], 2),
            "heldout_gap": round(snapml["eval_loss"] / best["eval_loss"] - 1, 4),
            "heldout_gap_default": round(snapml["eval_loss"] / default["eval_loss"] - 1, 4)
            if default
            else None,
            "events_ratio": round(snapml["events_share"], 4),
            **{
                f"{name}_tokens_per_second": round(one["tokens_per_second"], 1)
                for name, one in results.items()
            },
            **{f"{name}_peak_mb": round(one["peak_bytes"] / 1e6) for name, one in results.items()},
        }
    )


if __name__ == "__main__":
    main()
