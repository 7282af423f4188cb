"""Atomic checkpoints: files go to a temporary folder, are synced, get a manifest with hashes, and
the folder is renamed last.

A checkpoint holds the weights (weights.py), the optimizer's tensors, the random state and a small
JSON file. Everything is safetensors or JSON; nothing is pickled. The learning rate and the position
in the data are not stored because they follow from the step number.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.engine.config import RunConfig
from training.engine.file_names import MAX_RECENT_CHECKPOINTS, STATE_FILES
from training.engine.files import fsync_path, sha256_file, write_atomically
from training.engine.modeling import optimizers, weights

FOLDER = "checkpoints"
OPTIMIZER_PREFIX = "optimizer."
MANIFEST = STATE_FILES[2]


def get_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def parse_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@dataclass(frozen=True)
class CheckpointState:
    """The objects that a checkpoint saves and restores. `initial_adapter` is the adapter before
    its first step, for the initializations that need it when saving (weights.py).
    """

    model: Any
    optimizer: torch.optim.Optimizer
    config: RunConfig
    initial_adapter: dict[str, Tensor] | None = None


def save_checkpoint(
    run_dir: Path, step: int, state: CheckpointState, trainer_state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and return its folder.

    Raises:
        OSError, SafetensorError: for example a full disk; no partial folder remains.
    """
    root = run_dir / FOLDER
    root.mkdir(exist_ok=True)
    remove_partial(root)
    temp_dir = root / f".tmp-{step}-{os.getpid()}"
    try:
        temp_dir.mkdir()
        weights.write_weights(state.model, temp_dir, state.initial_adapter)
        save_file(get_state_tensors(state), temp_dir / STATE_FILES[0])
        (temp_dir / STATE_FILES[1]).write_text(
            json.dumps(
                {"step": step, "optimizer": get_optimizer_kind(state.optimizer), **trainer_state}
            )
        )
        files = sorted(path for path in temp_dir.iterdir())
        for path in files:
            fsync_path(path)
        manifest = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in files
        }
        write_atomically(
            temp_dir / MANIFEST, json.dumps({"step": step, "files": manifest}, indent=1)
        )
        final = root / get_folder_name(step)
        # An existing folder is damaged, or is the selected trial's checkpoint before its evaluation
        shutil.rmtree(final, ignore_errors=True)
        temp_dir.rename(final)
    except (OSError, SafetensorError):
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    fsync_path(root)
    return final


def get_state_tensors(state: CheckpointState) -> dict[str, Tensor]:
    """The optimizer's state, the raw weights that a saved adapter does not hold exactly, and the
    random state of every device (`rng.cpu`, `rng.cuda:0`).
    """
    tensors = {
        f"{OPTIMIZER_PREFIX}{name}": value
        for name, value in optimizers.get_state(state.optimizer).items()
    }
    tensors |= weights.get_raw_weights(state.model, state.config)
    tensors["rng.cpu"] = torch.get_rng_state()
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda:{index}"] = torch.cuda.get_rng_state(index)
    return tensors


def load_checkpoint(folder: Path, state: CheckpointState) -> dict[str, Any]:
    """Restore weights, optimizer and random state. Returns the saved trainer state with `step` and
    `is_optimizer_reset`.

    `is_optimizer_reset` is true if the checkpoint comes from a different optimizer class. Then all
    but the optimizer's state is restored.
    """
    tensors = load_file(folder / STATE_FILES[0])
    raw = {name: value for name, value in tensors.items() if name.startswith(weights.RAW_PREFIX)}
    weights.read_weights(state.model, folder, raw)
    trainer_state: dict[str, Any] = json.loads((folder / STATE_FILES[1]).read_text())
    saved_optimizer = trainer_state.pop("optimizer")
    trainer_state["is_optimizer_reset"] = saved_optimizer != get_optimizer_kind(state.optimizer)
    if not trainer_state["is_optimizer_reset"]:
        optimizer_state = {
            name.removeprefix(OPTIMIZER_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(OPTIMIZER_PREFIX)
        }
        optimizers.load_state(state.optimizer, optimizer_state)
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda:{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda:{index}"], index)
    return trainer_state


def get_optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def find_latest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest verifies. Damaged checkpoints are skipped."""
    return next((folder for folder in list_checkpoints(run_dir) if is_valid(folder)), None)


def list_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Checkpoint folders, newest first."""
    yield from sorted((run_dir / FOLDER).glob("step-*"), reverse=True)


def is_valid(folder: Path) -> bool:
    """Whether every file of the manifest exists with the recorded size and hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and sha256_file(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def prune_checkpoints(run_dir: Path, best_step: int | None) -> None:
    """Delete all but the newest MAX_RECENT_CHECKPOINTS and the best one."""
    for folder in list(list_checkpoints(run_dir))[MAX_RECENT_CHECKPOINTS:]:
        if parse_step(folder) != best_step:
            shutil.rmtree(folder)


def remove_partial(root: Path) -> None:
    """Remove partial checkpoints of a killed engine. Only one engine runs in a folder, so none of
    them is in use.
    """
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)


def export_adapter(source: Path, run_dir: Path) -> Path:
    """Copy the weights of a checkpoint to `RUN_DIR/adapter` atomically."""
    final, temp_dir = run_dir / "adapter", run_dir / ".adapter"
    shutil.rmtree(temp_dir, ignore_errors=True)
    temp_dir.mkdir()
    for path in source.iterdir():
        if path.name not in STATE_FILES:
            shutil.copyfile(path, temp_dir / path.name)
            fsync_path(temp_dir / path.name)
    shutil.rmtree(final, ignore_errors=True)
    temp_dir.rename(final)
    fsync_path(run_dir)
    return final
