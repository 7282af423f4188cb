"""`python -m adapters.programs.weight_analysis FOLDER`: how much versions changed each weight of
their base model, and how similar two versions are.

Tensors are read from the files one by one, so a model of any size needs the memory of one matrix.
The size of a change is its Frobenius norm relative to the weight's. Two changes are compared by
their subspace similarity (Hu et al. 2021, section 7.3, eq. 4): ||U_i' U_j||^2_F / k for the first k
left singular vectors. 1 is the same subspace, k / d is expected by chance. Methods that change no
weight are compared by their outputs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from training.engine.fast_imports import fast_imports

with fast_imports():
    import torch
    from safetensors import safe_open
    from torch import Tensor

    from adapters.programs.output_similarity import compare_outputs
    from adapters.programs.weight_deltas import WeightDelta, load_deltas
    from adapters.registry.base_shapes import find_weight_name
    from training.child_process import emit_message, main, read_params
    from training.errors import UserError

MAX_DIRECTIONS = 8  # singular vectors of each change that are compared
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Member:
    """A version in the comparison: its key, method, and the folders of base model and weights."""

    key: str
    method: str
    base: Path
    folder: Path


def compare_versions(params: dict[str, Any]) -> dict[str, Any]:
    """Compare all versions.

    Parameters: `members`, and `prompts` as lists of messages. Result: `relative_change` and
    `similarities` by module, `outputs` where a method changes no weight, and `layers` for the map.
    """
    members = [
        Member(entry["key"], entry["method"], Path(entry["base"]), Path(entry["folder"]))
        for entry in params["members"]
    ]
    relative_change: dict[str, dict[str, float]] = {}
    directions: dict[str, dict[str, Tensor]] = {}
    for done, member in enumerate(members):
        emit_message(message=f"reading {member.key}", done=done, total=len(members) + 1)
        for module, delta, weight_norm in compute_deltas(member):
            relative_change.setdefault(member.key, {})[module] = (
                delta.norm() / weight_norm if weight_norm else 0.0
            )
            directions.setdefault(member.key, {})[module] = delta.left_singular_vectors(
                MAX_DIRECTIONS
            )
    similarities = {
        f"{one.key},{other.key}": subspace_similarity(directions[one.key], directions[other.key])
        for one, other in combinations(members, 2)
        if one.base == other.base and one.key in directions and other.key in directions
    }
    outputs = {}
    if len(directions) < len(members):
        emit_message(message="comparing outputs", done=len(members))
        outputs = compare_outputs(members, params["prompts"])
    return {
        "relative_change": relative_change,
        "similarities": similarities,
        "outputs": outputs,
        "layers": heatmap_axes(relative_change),
    }


def compute_deltas(member: Member) -> Iterator[tuple[str, WeightDelta, float]]:
    """(module, its change, the norm of its base weight) for every weight that the version changes.

    Raises:
        UserError: the base model has no such weight.
    """
    files: list[Any] = [safe_open(path, "pt") for path in sorted(member.base.glob("*.safetensors"))]
    files_by_weight = {name: file for file in files for name in tensor_names(file)}
    for module, make_delta in load_deltas(member.folder, member.method):
        name = find_weight_name(module, files_by_weight)
        if name is not None:
            weight = files_by_weight[name].get_tensor(name).float()
            yield module, make_delta(weight), float(weight.norm())
        elif member.method != "full":
            raise UserError(
                f"The base of {member.key} has no weight {module!r}, but the adapter changes it."
            )


def tensor_names(file: Any) -> list[str]:
    return list(file.keys())


def subspace_similarity(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The subspace similarity of each module that both changed, from 0 to 1."""
    similarities = {}
    for module in ours.keys() & theirs.keys():
        one, other = ours[module], theirs[module]
        count = min(one.shape[1], other.shape[1])
        if count and one.shape[0] == other.shape[0]:
            similarities[module] = float(
                (one[:, :count].T @ other[:, :count]).square().sum() / count
            )
    return similarities


def heatmap_axes(relative_change: dict[str, dict[str, float]]) -> dict[str, tuple[int, str]]:
    """Layer and name of each module, for the rows and columns of the heat map. Modules outside the
    layers have layer -1.
    """
    axes = {}
    for module in sorted(
        {module for by_module in relative_change.values() for module in by_module}
    ):
        layer = LAYER.search(f".{module}.")
        inner = module.split(f".{layer.group(1)}.", 1)[1] if layer else module
        axes[module] = (int(layer.group(1)) if layer else -1, inner.split(".")[-1])
    return axes


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(lambda: emit_message(result=compare_versions(read_params()))))
