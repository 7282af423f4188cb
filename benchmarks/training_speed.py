"""SnapML's engine against TRL's SFTTrainer: same model, rows, LoRA (r 16 on all linear layers),
effective batch 8 and steps.

Each arm is a process of its own, in turn: ours, TRL as it comes, TRL at its best (no gradient
checkpointing, bf16 where the hardware has it, the very batches of ours, rows of like length
together, and its start, so that the held-out losses can be compared). `--trl-python` names the
Python of an environment that has trl; `--model` a model's folder.
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
BATCH, RATE, WARM, HELDOUT = 8, 2e-4, 2, 100


def encoded(folder: Path, split: str) -> list[Any]:
    from training.engine.data.conversations import encode, load_tokenizer, read_rows

    tokenizer = load_tokenizer(folder)
    return [
        encode(tokenizer, row, max_length=512)
        for row in read_rows(EXAMPLE)
        if row["split"] == split
    ]


def eval_loss(model: Any, folder: Path, rows: list[Any]) -> float:
    """Nats per trained token over held-out rows, computed in one way for every arm."""
    import torch

    from training.engine.modeling.model import LabeledPositionsHead
    from training.engine.train.evaluate import collate

    head, total = LabeledPositionsHead(model), 0.0
    device = next(model.parameters()).device
    with torch.no_grad():
        for place in range(len(rows)):
            total += head.compute_loss_sum(model.eval(), *collate([(place,)], rows, 0, device)).item()
    return float(total / sum(row.trained for row in rows))


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def asked(steps: int) -> dict[str, Any]:
    return {
        "batch_unit": "rows",
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "max_steps": steps,
    }


def in_our_order(rows: list[Any], steps: int) -> list[Any]:
    """The rows as the engine takes them, batch after batch."""
    from training.engine.batches import plan_steps
    from training.engine.config import RunConfig

    plan = plan_steps([len(row) for row in rows], RunConfig.from_dict(asked(steps)))
    return [
        rows[place] for step in plan.steps for batch in step for packed in batch for place in packed
    ]


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """The engine itself, on a run folder, journal and memory readings included; only measuring and
    saving wait for the end.
    """
    from training.engine.__main__ import main as engine

    run = Path(tempfile.mkdtemp(prefix="snapml-speed-")) / "run"
    run.mkdir()
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    for name in ("train", "heldout"):
        kept = [
            line for line in lines if line["split"] == ("train" if name == "train" else "test")
        ] or lines[:HELDOUT]
        (run / f"{name}.jsonl").write_text("\n".join(map(json.dumps, kept)))
    settings = asked(steps) | {
        "model": str(folder),
        "train_data": str(run / "train.jsonl"),
        "eval_data": str(run / "heldout.jsonl"),
        "eval_steps": 10**6,
        "eval_rows": 1,
        "save_steps": 10**6,
        "export_checkpoint": "last",
    }
    (run / "config.json").write_text(json.dumps(settings))
    assert engine([str(run)]) == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    taken = [event for event in events if event["kind"] == "step"]
    first, last = taken[WARM - 1]["time"], taken[-1]["time"]
    peak = max(event["memory_peak_bytes"] for event in taken)
    inside = sum(event["seconds"] for event in taken[WARM:])

    import torch

    from training.engine.modeling.model import get_fastest_dtype, load_base, resolve_device
    from training.engine.modeling.weights import load_adapter

    device = resolve_device()
    model = load_adapter(load_base(folder, get_fastest_dtype(device), device), run / "adapter", "default")
    torch.use_deterministic_algorithms(False)
    return {
        "tokens_per_second": sum(event["tokens"] for event in taken[WARM:]) / (last - first),
        "peak_bytes": peak,
        "eval_loss": eval_loss(model, folder, encoded(folder, "test")[:HELDOUT]),
        "events_share": 1 - inside / (last - first),
    }


def start_as_ours(model: Any, folder: Path, steps: int) -> None:
    """Give TRL's adapter the engine's start, so that nothing but the training differs."""
    import torch

    from training.engine.config import RunConfig
    from training.engine.modeling.model import get_fastest_dtype, load_base, resolve_device, wrap_base_model

    config, device = RunConfig.from_dict(asked(steps)), resolve_device()
    torch.manual_seed(config.seed)
    mine = dict(wrap_base_model(load_base(folder, get_fastest_dtype(device), device), config).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(mine[name])


def trl(folder: Path, steps: int, *, best: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from training.engine.data.conversations import load_tokenizer
    from training.engine.modeling.model import get_fastest_dtype, resolve_device

    rows = encoded(folder, "train")
    rows = in_our_order(rows, steps) if best else rows
    data = Dataset.from_list(
        [{"input_ids": r.ids.tolist(), "labels": r.labels.tolist()} for r in rows]
    )
    fast = get_fastest_dtype(resolve_device())
    tuned = {
        "gradient_checkpointing": False,
        "bf16": fast is torch.bfloat16,
        "train_sampling_strategy": "sequential",
    }
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        model_init_kwargs={"dtype": fast} if best else None,
        **(tuned if best else {}),
    )
    trainer = SFTTrainer(
        model=str(folder),
        args=settings,
        train_dataset=data,
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    if best:
        start_as_ours(trainer.model, folder, steps)
    counted: list[tuple[float, int]] = []
    plain = trainer.training_step

    def step(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        counted.append((wait(), int(tokens)))
        return plain(model, inputs, *more, **named)

    trainer.training_step = step
    trainer.train()
    end = wait()
    return {
        "tokens_per_second": sum(tokens for _, tokens in counted[WARM:]) / (end - counted[WARM][0]),
        "peak_bytes": peak_bytes(),
        "eval_loss": eval_loss(trainer.model, folder, encoded(folder, "test")[:HELDOUT]),
    }


def arm(name: str, folder: Path, steps: int) -> dict[str, Any]:
    return ours(folder, steps) if name == "ours" else trl(folder, steps, best=name == "trl_best")


def run_arm(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one arm, measured in a process of its own."""
    from training.child_process import STEADY_MEMORY

    python = sys.executable if name == "ours" else arguments.trl_python
    command = [python, "-W", "ignore", __file__, "--arm", name]
    command += ["--model", str(folder), "--steps", str(arguments.steps)]
    # As the site starts its engine.
    environment = os.environ | (STEADY_MEMORY if name == "ours" else {})
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
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
            "\n" + json.dumps(arm(arguments.arm, arguments.model, arguments.steps)) + "\n"
        )
        return
    from benchmarks import report
    from benchmarks.engine_step import built_in

    folder = arguments.model or built_in()
    told: dict[str, dict[str, Any]] = {}
    for name in ("trl_default", "ours", "trl_best"):
        if name == arguments.skip:
            continue
        told[name] = run_arm(name, folder, arguments)
        sys.stderr.write(f"{name}: {told[name]}\n")
    best, mine = told["trl_best"], told["ours"]
    default = told.get("trl_default")
    report(
        {
            "ratio_default": round(mine["tokens_per_second"] / default["tokens_per_second"], 2)
            if default
            else None,
            "ratio_best": round(mine["tokens_per_second"] / best["tokens_per_second"], 2),
            "heldout_gap": round(mine["eval_loss"] / best["eval_loss"] - 1, 4),
            "heldout_gap_default": round(mine["eval_loss"] / default["eval_loss"] - 1, 4)
            if default
            else None,
            "events_ratio": round(mine["events_share"], 4),
            **{
                f"{name}_tokens_per_second": round(one["tokens_per_second"], 1)
                for name, one in told.items()
            },
            **{f"{name}_peak_mb": round(one["peak_bytes"] / 1e6) for name, one in told.items()},
        }
    )


if __name__ == "__main__":
    main()
