"""Auto LLM's plan against the defaults of TRL, LLaMA-Factory and Unsloth as recipes, by held-out
loss after the same seconds.

Every recipe trains with SnapML's engine, so that only the settings differ; each gets as many steps
as fit `--seconds` on this machine (measured first), and its schedule ends with them. Both example
data sets; losses are over the same held-out rows.
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

DATA = ("smart_home", "shell_commands")
HELDOUT, TIMED = 100, 6
ROWS = {"batch_unit": "rows"}
RECIPES: dict[str, dict[str, Any]] = {
    "trl": {
        **ROWS,
        **{
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": "q_proj,v_proj",
            "learning_rate": 2e-5,
        },
        **{"per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "max_length": 1024},
    },
    "llama_factory": {
        **ROWS,
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
        **ROWS,
        **{
            "rank": 16,
            "alpha": 16,
            "target_modules": "all-linear",
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
        **{"lr_scheduler_type": "linear", "warmup_ratio": 0.08, "weight_decay": 0.01, "max_length": 2048},
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
    for split, rows in (("train", train), ("heldout", test[:HELDOUT])):
        (folder / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"messages": row["messages"]}) for row in rows)
        )


def train(model: Path, data: Path, settings: dict[str, Any], steps: int) -> tuple[float, float]:
    """Held-out loss after so many steps, and seconds a step."""
    run = Path(tempfile.mkdtemp(prefix="snapml-auto-"))
    ends = {
        "eval_steps": 10**6,
        "save_steps": 10**6,
        "exact_match_rows": 0,
        "early_stopping_patience": 0,
        "export_checkpoint": "last",
    }
    places = {
        "model": str(model),
        "train_data": str(data / "train.jsonl"),
        "eval_data": str(data / "heldout.jsonl"),
    }
    whole = {**settings, **ends, **places, "max_steps": steps, "epochs": 1000, "eval_rows": HELDOUT}
    (run / "config.json").write_text(json.dumps(whole))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "training.engine", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{settings}: {(run / 'events.jsonl').read_text()[-800:]}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    seconds = [event["seconds"] for event in events if event["kind"] == "step"][2:]
    losses = [event["eval_loss"] for event in events if event["kind"] == "eval"]
    return losses[-1], sum(seconds) / len(seconds)


def planned(model: Path, data: Path, locked: dict[str, Any]) -> dict[str, Any]:
    """Auto's settings for these rows on this machine."""
    import numpy as np
    import psutil

    from training.auto.plan import make_plan
    from training.auto.situation import Situation
    from training.catalog.card import linear_layers, read_card
    from training.engine.batches import plan_steps
    from training.engine.data.conversations import encode, load_tokenizer, read_rows
    from training.engine.memory_estimator import BatchShape, find_peak_memory
    from training.engine.simulation.forecast import law_of

    tokenizer, card = load_tokenizer(model), read_card(model)
    rows = [encode(tokenizer, row, max_length=8192) for row in read_rows(data / "train.jsonl")]
    lengths = np.asarray([len(row) for row in rows], dtype=np.int32)

    import torch

    from benchmarks import law_device

    def need(config: Any) -> dict[str, Any]:
        law = law_of(model, config, law_device(torch.device("cpu")))
        at_once = max(1, config.max_tokens_per_batch // config.max_length)
        peak = (
            find_peak_memory(
                law, [BatchShape(at_once, config.max_length, at_once * config.max_length)], config
            ).total
            + 0.9e9
        )
        return {
            "peak": peak,
            "precision": law.metadata["precision"],
            "optimizer": law.metadata["optimizer"],
        }

    memory = psutil.virtual_memory()
    situation = Situation(
        model=model.name,
        hidden_size=card["hidden_size"],
        context_length=card["context_length"],
        parameters_a_rank=sum(a + b for _, (a, b) in linear_layers(model)),
        rows=len(rows),
        heldout_rows=HELDOUT,
        lengths=lengths,
        trained=np.asarray([row.trained for row in rows], dtype=np.int32),
        device="CPU",
        total=memory.total,
        free=memory.available,
        need=need,
        steps=lambda config: (
            plan_steps(np.minimum(lengths, config.max_length).tolist(), config).total_steps
        ),
    )
    return make_plan(situation, locked=locked).settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parser.parse_args()
    from benchmarks import report
    from benchmarks.engine_step import built_in

    model = arguments.model or built_in()
    rows: list[dict[str, Any]] = []
    for name in DATA:
        data = Path(tempfile.mkdtemp(prefix="snapml-auto-data-"))
        write_data(name, data)
        told: dict[str, dict[str, Any]] = {}
        for recipe in ("auto", *RECIPES):
            settings = RECIPES[recipe] if recipe != "auto" else planned(model, data, {})
            _, seconds = train(model, data, settings, TIMED)
            steps = max(4, round(arguments.seconds / seconds))
            if recipe == "auto":
                settings = planned(model, data, {"max_steps": steps})
            loss, seconds = train(model, data, settings, steps)
            told[recipe] = {
                "data": name,
                "recipe": recipe,
                "steps": steps,
                "seconds": round(steps * seconds, 1),
                "loss": round(loss, 4),
            }
            sys.stderr.write(f"{told[recipe]}\n")
        rows += told.values()
    best = {
        name: min((row for row in rows if row["data"] == name), key=lambda row: row["loss"])[
            "recipe"
        ]
        for name in DATA
    }
    report(
        {
            "wins": sum(one == "auto" for one in best.values()),
            "recipes": list(RECIPES),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
