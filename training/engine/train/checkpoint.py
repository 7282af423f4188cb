"""Checkpoints that are whole or not there: written aside, synced, manifest with hashes last, then
renamed.

A checkpoint holds the weights (weights.py), the optimizer's tensors, the random state and a small
JSON: all safetensors and JSON, nothing pickled. What it does not hold (learning rate, place in the
data) follows from the step number.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.engine.config import RunConfig
from training.engine.file_names import STATE_FILES
from training.engine.files import sha256_file, fsync_path, write_atomically
from training.engine.modeling import optimizers, weights

FOLDER = "checkpoints"
OPTIMIZER = "optimizer."
MANIFEST = STATE_FILES[2]
KEPT = 2  # newest; the best one is kept besides


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@dataclass(frozen=True)
class Trained:
    """What a checkpoint is made of. `start` is the adapter before its first step, where saving
    needs it (weights.py).
    """

    model: Any
    optimizer: torch.optim.Optimizer
    config: RunConfig
    start: dict[str, Tensor] | None = None


def save(run_dir: Path, step: int, trained: Trained, facts: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and return its folder. A full disk raises OSError and leaves
    nothing behind.
    """
    root = run_dir / FOLDER
    root.mkdir(exist_ok=True)
    sweep(root)
    aside = root / f".tmp-{step}-{os.getpid()}"
    try:
        aside.mkdir()
        weights.write_weights(trained.model, aside, trained.start)
        save_file(state_tensors(trained), aside / STATE_FILES[0])
        (aside / STATE_FILES[1]).write_text(
            json.dumps({"step": step, "optimizer": kind_of(trained.optimizer), **facts})
        )
        files = sorted(path for path in aside.iterdir())
        for path in files:
            fsync_path(path)
        manifest = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in files
        }
        write_atomically(aside / MANIFEST, json.dumps({"step": step, "files": manifest}, indent=1))
        final = root / name_of(step)
        # One that did not verify, or resume would have begun there
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(root)
    return final


def state_tensors(trained: Trained) -> dict[str, Tensor]:
    """The optimizer's state, weights that are not saved as they are trained, and the random state
    of every device (`rng.cpu`).
    """
    tensors = {
        f"{OPTIMIZER}{name}": value
        for name, value in optimizers.get_state(trained.optimizer).items()
    }
    tensors |= weights.get_raw_weights(trained.model, trained.config)
    tensors["rng.cpu"] = torch.get_rng_state()
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda:{index}"] = torch.cuda.get_rng_state(index)
    return tensors


def load(folder: Path, trained: Trained) -> dict[str, Any]:
    """Put weights, optimizer and random state back as they were; returns the facts given to `save`,
    and `step`.

    `restarted`: the checkpoint is of another kind of optimizer, so this one begins with the weights
    alone.
    """
    tensors = load_file(folder / STATE_FILES[0])
    raw = {name: value for name, value in tensors.items() if name.startswith(weights.RAW_PREFIX)}
    weights.read_weights(trained.model, folder, raw)
    facts: dict[str, Any] = json.loads((folder / STATE_FILES[1]).read_text())
    facts["restarted"] = facts.pop("optimizer") != kind_of(trained.optimizer)
    if not facts["restarted"]:
        kept = {
            name.removeprefix(OPTIMIZER): value
            for name, value in tensors.items()
            if name.startswith(OPTIMIZER)
        }
        optimizers.load_state(trained.optimizer, kept)
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda:{index}"], index)
    return facts


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest verifies; damaged ones are passed over."""
    return next((folder for folder in all_checkpoints(run_dir) if is_whole(folder)), None)


def all_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Newest first."""
    yield from sorted((run_dir / FOLDER).glob("step-*"), reverse=True)


def is_whole(folder: Path) -> bool:
    """Every file of the manifest is there with the size and hash that were written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            (folder / name).stat().st_size == facts["bytes"]
            and sha256_file(folder / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def forget_old(run_dir: Path, best_step: int | None) -> None:
    """Keep the newest KEPT checkpoints and the best one."""
    for folder in list(all_checkpoints(run_dir))[KEPT:]:
        if step_of(folder) != best_step:
            shutil.rmtree(folder)


def sweep(root: Path) -> None:
    """Remove what a killed engine left half-written. Only one engine runs in a folder, so none of
    it is in use.
    """
    for rest in root.glob(".tmp-*"):
        shutil.rmtree(rest)


def export_adapter(source: Path, run_dir: Path) -> Path:
    """Copy what a checkpoint learned to `RUN_DIR/adapter`, whole or not at all."""
    final, aside = run_dir / "adapter", run_dir / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in source.iterdir():
        if path.name not in STATE_FILES:
            shutil.copyfile(path, aside / path.name)
            fsync_path(aside / path.name)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    fsync_path(run_dir)
    return final
