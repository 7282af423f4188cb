"""Compare Auto LLM's plan with the default settings of TRL, LLaMA-Factory and Unsloth by held-out
loss after the same training time.

Every recipe trains with SnapML's engine, so only the settings differ. Each recipe gets as many
steps as fit into `--seconds` on this machine (measured first), and its schedule ends with them.
Both example datasets are used; losses are over the same held-out rows.
Sources: TRL 1.16 (SFTConfig, and ModelConfig's LoRA), LLaMA-Factory's
    examples/train_lora/llama3_lora_sft.yaml, and Unsloth's Llama notebooks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DATASETS = ("smart_home", "shell_commands")
EVAL_ROWS, TIMED_STEPS = 100, 6
ROW_BATCHES = {"batch_unit": "rows"}
RECIPES: dict[str, dict[str, Any]] = {
    "trl": {
        **ROW_BATCHES,
        **{
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": "q_proj,v_proj",
            "learning_rate": 2e-5,
        },
        **{
            "per_device_train_batch_size": 8,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "max_length": 1024,
        },
    },
    "llama_factory": {
        **ROW_BATCHES,
        **{
            "rank": 8,
            "alpha": 16,
            "target_modules": "all-linear",
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
        },
        **{"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "max_length": 2048},
    },
    "unsloth": {
        **ROW_BATCHES,
        **{
            "rank": 16,
            "alpha": 16,
            "target_modules": "all-linear",
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
        **{
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.08,
            "weight_decay": 0.01,
            "max_length": 2048,
        },
    },
}


def write_data(name: str, folder: Path) -> None:
    lines = [
        json.loads(line)
        for line in (ROOT / f"training/datasets/example_files/{name}.jsonl")
        .read_text()
        .splitlines()
    ]
    test = [line for line in lines if line.get("split") == "test"] or lines[::10]
    train = [line for line in lines if line not in test]
    for split, rows in (("train", train), ("heldout", test[:EVAL_ROWS])):
        (folder / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"messages": row["messages"]}) for row in rows)
        )


def train_recipe(
    model: Path, data: Path, settings: dict[str, Any], steps: int
) -> tuple[float, float]:
    """Train for `steps` steps. Returns the held-out loss and the seconds per step."""
    run_dir = Path(tempfile.mkdtemp(prefix="snapml-auto-"))
    fixed_settings = {
        "eval_steps": 10**6,
        "save_steps": 10**6,
        "exact_match_rows": 0,
        "early_stopping_patience": 0,
        "export_checkpoint": "last",
    }
    paths = {
        "model": str(model),
        "train_data": str(data / "train.jsonl"),
        "eval_data": str(data / "heldout.jsonl"),
    }
    run_settings = {
        **settings,
        **fixed_settings,
        **paths,
        "max_steps": steps,
        "epochs": 1000,
        "eval_rows": EVAL_ROWS,
    }
    (run_dir / "config.json").write_text(json.dumps(run_settings))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "training.engine", str(run_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"{settings}: {(run_dir / 'events.jsonl').read_text()[-800:]}")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    seconds = [event["seconds"] for event in events if event["kind"] == "step"][2:]
    losses = [event["eval_loss"] for event in events if event["kind"] == "eval"]
    return losses[-1], sum(seconds) / len(seconds)


def plan_settings(model: Path, data: Path, locked: dict[str, Any]) -> dict[str, Any]:
    """Auto's settings for these rows on this machine."""
    import numpy as np
    import psutil

    from training.auto.plan import make_plan
    from training.auto.plan_types import PlanInputs
    from training.catalog.metadata import list_linear_layers, read_model_metadata
    from training.engine.batches import plan_steps
    from training.engine.data.conversations import encode_row, load_tokenizer, read_rows
    from training.engine.memory_estimator import BatchShape, find_peak_memory
    from training.engine.simulation.forecast import build_estimator

    tokenizer, model_card = load_tokenizer(model), read_model_metadata(model)
    rows = [encode_row(tokenizer, row, max_length=8192) for row in read_rows(data / "train.jsonl")]
    lengths = np.asarray([len(row) for row in rows], dtype=np.int32)

    import torch

    from benchmarks import estimator_device

    def forecast_memory(config: Any) -> dict[str, Any]:
        estimator = build_estimator(model, config, estimator_device(torch.device("cpu")))
        row_count = max(1, config.max_tokens_per_batch // config.max_length)
        peak = (
            find_peak_memory(
                estimator,
                [BatchShape(row_count, config.max_length, row_count * config.max_length)],
                config,
            ).total
            + 0.9e9
        )
        return {
            "peak": peak,
            "precision": estimator.metadata["precision"],
            "optimizer": estimator.metadata["optimizer"],
        }

    memory = psutil.virtual_memory()
    inputs = PlanInputs(
        model=model.name,
        hidden_size=model_card["hidden_size"],
        context_length=model_card["context_length"],
        parameters_per_rank=sum(a + b for _, (a, b) in list_linear_layers(model)),
        rows=len(rows),
        eval_rows=EVAL_ROWS,
        lengths=lengths,
        trained_lengths=np.asarray([row.trained_tokens for row in rows], dtype=np.int32),
        device="CPU",
        total_bytes=memory.total,
        free_bytes=memory.available,
        forecast_memory=forecast_memory,
        count_steps=lambda config: (
            plan_steps(np.minimum(lengths, config.max_length).tolist(), config).total_steps
        ),
    )
    return make_plan(inputs, locked=locked).settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parser.parse_args()
    from benchmarks import print_report
    from benchmarks.engine_step import import_builtin_model

    model = arguments.model or import_builtin_model()
    rows: list[dict[str, Any]] = []
    for name in DATASETS:
        data = Path(tempfile.mkdtemp(prefix="snapml-auto-data-"))
        write_data(name, data)
        results: dict[str, dict[str, Any]] = {}
        for recipe in ("auto", *RECIPES):
            settings = RECIPES[recipe] if recipe != "auto" else plan_settings(model, data, {})
            _, seconds = train_recipe(model, data, settings, TIMED_STEPS)
            steps = max(4, round(arguments.seconds / seconds))
            if recipe == "auto":
                settings = plan_settings(model, data, {"max_steps": steps})
            loss, seconds = train_recipe(model, data, settings, steps)
            results[recipe] = {
                "data": name,
                "recipe": recipe,
                "steps": steps,
                "seconds": round(steps * seconds, 1),
                "loss": round(loss, 4),
            }
            sys.stderr.write(f"{results[recipe]}\n")
        rows += results.values()
    best = {
        name: min((row for row in rows if row["data"] == name), key=lambda row: row["loss"])[
            "recipe"
        ]
        for name in DATASETS
    }
    print_report(
        {
            "wins": sum(one == "auto" for one in best.values()),
            "recipes": list(RECIPES),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
