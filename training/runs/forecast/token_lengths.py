"""What a model will see of a data set: lengths measured once and kept beside the data, and single
rows token by token.

Both are asked of `training.engine.data.preview`, a program of its own, because a model's chat
template is code that somebody wrote.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from training.catalog.models import BaseModel
from training.child_process import run_child
from training.datasets.models import DatasetVersion
from training.engine.batches import build_epoch_batches, get_sequence_length
from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.errors import UserError

# about a millisecond each; of larger sets every n-th row is measured, and the page says so
MOST_ROWS = 20_000
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)  # what the data page offers
PATIENCE_SECONDS = 150
BUSY_SECONDS = 30
AGAIN_SECONDS = 600
AT_ONCE = threading.BoundedSemaphore(3)
BINS = 40
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class Busy(UserError):
    """Too many people look at tokens at this moment."""

    status = 429


@dataclass(frozen=True)
class Lengths:
    """int32 arrays, one number a measured row: all tokens, trained tokens, and the place of the
    first trained one.
    """

    total: NDArray[np.int32]
    trained: NDArray[np.int32]
    first: NDArray[np.int32]
    trained_at: dict[int, NDArray[np.int32]]  # of LENGTHS: trained tokens before that place
    rows: int  # in the set; more than were measured if it is large
    template: str
    fault: str

    @property
    def measured(self) -> int:
        return len(self.total)

    def kept(self, max_length: int) -> list[int]:
        """Lengths of the rows that keep something to train, cut off as the engine cuts them."""
        found: list[int] = np.minimum(self.total, max_length)[self.first < max_length].tolist()
        return found

    @property
    def factor(self) -> float:
        """What a count of the measured rows stands for."""
        return self.rows / max(1, self.measured)


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Run the program on a request.

    Raises:
        Busy: its places are all taken.
        UserError: what it said, or that it took too long.
    """
    if not AT_ONCE.acquire(timeout=BUSY_SECONDS):
        raise Busy("Others are looking at tokens just now; try again in a minute.")
    try:
        done = run_child(
            "training.engine.data.preview",
            stdin=json.dumps(request),
            cwd=settings.BASE_DIR,
            seconds=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "This model's chat template took too long; it may never end.", field="model"
        ) from error
    finally:
        AT_ONCE.release()
    if done.returncode or not done.stdout:
        raise UserError(
            "This model's tokenizer or chat template broke off (out of time or memory).",
            field="model",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise UserError(answer["error"], field="model")
    return answer


def place(version: DatasetVersion, model: BaseModel, split: str, train_on_prompt: bool) -> Path:
    files = [model.folder / name for name in TOKENIZER_FILES]
    # Another tokenizer, another count
    seen = "|".join(f"{file}:{file.stat().st_mtime_ns}" for file in files if file.is_file())
    key = hashlib.sha256(seen.encode()).hexdigest()[:16]
    name = f"{key}-{split}{'-prompt' if train_on_prompt else ''}"
    return Path(settings.HOME) / "data" / version.digest / "lengths" / f"{name}.npz"


def kept_lengths(
    version: DatasetVersion,
    model: BaseModel,
    *,
    train_on_prompt: bool = False,
    split: str = "train",
) -> Lengths | None:
    """The lengths, if they have been measured."""
    path = place(version, model, split, train_on_prompt)
    told = path.with_suffix(".json")
    if not told.is_file():
        return None
    words = json.loads(told.read_text())
    with np.load(path) as arrays:
        at = {length: arrays[f"trained_{length}"] for length in LENGTHS}
        told_words = (words["rows"], words["template"], words["fault"])
        return Lengths(arrays["total"], arrays["trained"], arrays["first"], at, *told_words)


def lengths(
    version: DatasetVersion,
    model: BaseModel,
    *,
    train_on_prompt: bool = False,
    split: str = "train",
) -> Lengths:
    """The lengths, measured now if need be: about 2 s, and a millisecond a row up to MOST_ROWS.

    Raises:
        UserError: see `ask`.
    """
    kept = kept_lengths(version, model, train_on_prompt=train_on_prompt, split=split)
    if kept is not None:
        return kept
    path = place(version, model, split, train_on_prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = version.count(split)
    request = {
        "model": str(model.folder),
        "file": str(version.file(split)),
        "count": rows,
        "max_rows": MOST_ROWS,
        "into": str(path),
        "train_on_prompt": train_on_prompt,
        "lengths": LENGTHS,
    }
    failed = path.with_suffix(".failed")
    if failed.is_file() and failed.stat().st_mtime > time.time() - AGAIN_SECONDS:
        raise UserError(failed.read_text(), field="model")
    try:
        answer = ask(request)
    except Busy:
        raise
    except (
        UserError
    ) as error:  # remembered, or each look at the page would take the whole patience again
        failed.write_text(error.message)
        raise
    told = {"rows": rows, "template": answer["template"], "fault": answer["fault"]}
    write_atomically(path.with_suffix(".json"), json.dumps(told))
    made = kept_lengths(version, model, train_on_prompt=train_on_prompt, split=split)
    assert made is not None
    return made


def tokens_of(
    model: BaseModel, rows: list[dict[str, Any]], *, max_length: int, train_on_prompt: bool
) -> dict[str, Any]:
    """Each row as pieces of trained, masked and cut-off tokens, and which template was used.

    Raises:
        UserError: see `ask`.
    """
    request = {
        "model": str(model.folder),
        "rows": rows,
        "max_length": max_length,
        "train_on_prompt": train_on_prompt,
    }
    return ask(request)


def cut_at(found: Lengths, max_length: int) -> dict[str, Any]:
    """Shares at a length: rows cut off, rows left with nothing to train, and tokens."""
    usable = found.first < min(max_length, 2**30)
    kept = np.minimum(found.total, max_length)
    return {
        "rows": found.rows,
        "measured": found.measured,
        "longest": int(found.total.max(initial=0)),
        "cut": int((found.total > max_length).sum()),
        "cut_share": float((found.total > max_length).mean()) if found.measured else 0.0,
        "empty": int((~usable).sum()),
        "empty_share": float((~usable).mean()) if found.measured else 0.0,
        "tokens": int(kept[usable].sum() * found.factor),
        "answer_tokens": int(trained_within(found, max_length)[usable].sum() * found.factor),
        "template": found.template,
        "fault": found.fault,
    }


def trained_within(found: Lengths, max_length: int) -> NDArray[np.int32]:
    """Trained tokens of each row before a length: counted for those of LENGTHS, else as if the
    answer ran on from its start.
    """
    if max_length in found.trained_at:
        return found.trained_at[max_length]
    room = np.maximum(0, max_length - np.minimum(found.first, 2**30))
    return np.where(
        found.total <= max_length, found.trained, np.minimum(found.trained, room)
    ).astype(np.int32)


def padding(found: Lengths, config: RunConfig) -> dict[str, float]:
    """Share of padding with our batches, and with rows in random order in batches of the same
    size.
    """
    kept = found.kept(config.max_length)
    if not kept:
        return {"ours": 0.0, "random": 0.0}
    batches = build_epoch_batches(kept, config, 0)
    places = sum(len(batch) * max(get_sequence_length(packed, kept) for packed in batch) for batch in batches)
    size = max(1, round(len(kept) / len(batches)))
    shuffled = np.random.default_rng(0).permutation(np.asarray(kept))
    loose = sum(
        int(part.max()) * len(part) for part in np.array_split(shuffled, -(-len(kept) // size))
    )
    return {"ours": 1 - sum(kept) / places, "random": 1 - sum(kept) / loose}


def histogram(found: Lengths) -> dict[str, Any]:
    """Rows by their tokens: prompt, answer and total, over the same bins."""
    series = {"prompt": found.total - found.trained, "answer": found.trained, "total": found.total}
    most = max(1, int(found.total.max(initial=1)))
    edges = np.unique(np.linspace(0, most, BINS + 1).astype(int))
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in series.items()}
    return {"edges": edges.tolist(), **counts}
