"""Extrapolates the memory of a training step from a few simulated steps to any batch. Does not
import torch: the site evaluates it while a user moves a slider.

A simulated step has phases (such as "forward head"), and each phase has snapshots: the bytes in use
after each operator. The bytes of one snapshot are affine in each of: the number of layers, the
method's size (rank, virtual tokens, bottleneck width), rows x tokens, trained tokens, and with an
attention mask in rows x tokens squared. The peak is not affine, because it moves from one snapshot
to another. So every snapshot is fitted separately, and the maximum is taken after evaluation. All
values are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.config import RunConfig
from training.engine.methods import METHODS

# Tokens; up to this length a CPU uses training/engine/modeling/short_attention.py
MAX_SHORT_LENGTH = 128
# Attention scores computed at once, so that they fit into a core's cache. Without a limit, 32 rows
# of 128 tokens take four times as long.
MAX_SCORE_BYTES = 1_000_000

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BatchShape:
    """A batch of rows x length tokens, padding included, of which `trained_tokens` have a loss."""

    rows: int
    length: int
    trained_tokens: int


def build_features(shapes: Sequence[BatchShape], layers: float, size: float) -> Floats:
    """Return the features of the linear model, shape (shapes, 17). `size` is the value of the
    scaling setting.
    """
    r, t, m = (
        np.asarray([getattr(s, name) for s in shapes], dtype=float)
        for name in ("rows", "length", "trained_tokens")
    )
    ones, tokens, mask = np.ones_like(r), r * t, r * t * t
    plain = [ones, r, t, m, tokens, mask, t * t]
    deep = [ones * layers, tokens * layers, mask * layers]
    sized = [factor * size * depth for factor in (ones, r, tokens) for depth in (1, layers)]
    return np.stack([*plain, *deep, *sized, t * size], axis=1)


# Batches that are simulated at the first depth and size, enough to separate all features of a
# batch. The other corners need only the first few of them, which have three different numbers of
# rows so that rows and tokens can be separated where the size changes. None has a single row,
# because some reshapes of one row need no copy.
SAMPLE_SHAPES = (
    BatchShape(2, 256, 64),
    BatchShape(4, 768, 512),
    BatchShape(2, 768, 64),
    BatchShape(3, 512, 128),
    BatchShape(2, 512, 64),
    BatchShape(5, 256, 320),
    BatchShape(4, 384, 192),
    BatchShape(3, 640, 300),
    BatchShape(2, 384, 700),
)
SAMPLE_DEPTHS = (2, 3)
SAMPLE_SIZES = (8, 24)
SCALING_SETTINGS = ("rank", "num_virtual_tokens", "bottleneck_size")
# (index of the depth, index of the size) -> number of SAMPLE_SHAPES to simulate
SHAPES_PER_CORNER = {(0, 0): 9, (1, 0): 3, (0, 1): 4, (1, 1): 3}


@dataclass(frozen=True)
class MemoryEstimator:
    """The fitted memory use of one model, method and device.

    `snapshots[phase]` has the shape (snapshots, features, kinds): the bytes by kind at each
    snapshot of a phase are `build_features(...) @ snapshots[phase]`.
    """

    layers: int
    snapshots: dict[str, Floats]
    metadata: dict[str, Any]

    def compute_peaks(self, shapes: Sequence[BatchShape], size: float) -> dict[str, Floats]:
        """Return the bytes by kind at the peak of each phase, shape (shapes, kinds)."""
        features = build_features(shapes, self.layers, size)
        peaks = {}
        for name, coefficients in self.snapshots.items():
            bytes_by_kind = np.maximum(np.einsum("st,mtk->msk", features, coefficients), 0.0)
            peaks[name] = bytes_by_kind[
                bytes_by_kind.sum(axis=2).argmax(axis=0), np.arange(len(shapes))
            ]
        return peaks

    def to_json(self) -> dict[str, Any]:
        snapshots = {name: values.tolist() for name, values in self.snapshots.items()}
        return {"layers": self.layers, "snapshots": snapshots, "metadata": self.metadata}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MemoryEstimator:
        snapshots = {
            name: np.asarray(values, dtype=float) for name, values in data["snapshots"].items()
        }
        return cls(data["layers"], snapshots, data["metadata"])


Snapshots = dict[str, list[tuple[int, ...]]]  # phase -> the bytes by kind of each snapshot
Sample = tuple[int, int, BatchShape, Snapshots]  # layers, size, batch, result of a simulated step


def fit_least_squares(
    layers: int, samples: Sequence[Sample], metadata: dict[str, Any]
) -> MemoryEstimator:
    """Fit the samples by least squares. Features that the samples cannot separate get a coefficient
    of zero.

    If a phase does not have the same number of snapshots in all samples (the optimizer updates more
    tensors in a deeper model), only its peak is fitted.
    """
    features = np.concatenate(
        [build_features([shape], depth, size) for depth, size, shape, _ in samples]
    )
    scale = np.maximum(np.abs(features).max(axis=0), 1.0)
    coefficients = {}
    for name in set.intersection(*(set(sample) for *_, sample in samples)):
        measured = [np.asarray(sample[name], dtype=float) for *_, sample in samples]
        if len({len(one) for one in measured}) > 1:
            measured = [one[[one.sum(axis=1).argmax()]] for one in measured]
        targets = np.stack(measured)  # (samples, snapshots, kinds)
        flat = targets.reshape(len(samples), -1)
        solution = np.linalg.lstsq(features / scale, flat, rcond=1e-9)[0] / scale[:, None]
        coefficients[name] = solution.reshape(-1, *targets.shape[1:]).transpose(1, 0, 2)
    return MemoryEstimator(
        layers,
        {name: prune_dominated(array, layers) for name, array in coefficients.items()},
        metadata,
    )


def prune_dominated(coefficients: Floats, layers: int) -> Floats:
    """Keep the snapshots that are the peak for some batch and size: a handful out of hundreds."""
    shapes = [
        BatchShape(r, t, max(1, int(share * r * t)))
        for r in (1, 4, 32)
        for t in (16, 128, 1024, 16384)
        for share in (0.01, 0.3, 1)
    ]
    peak_snapshots: set[int] = set()
    for size in (0, 1, 16, 256, 4096):
        peak_snapshots |= set(
            np.einsum("st,mtk->ms", build_features(shapes, layers, size), coefficients)
            .argmax(axis=0)
            .tolist()
        )
    return coefficients[sorted(peak_snapshots)]


@dataclass(frozen=True)
class Peak:
    """The peak memory of a step: bytes by kind, the phase it occurs in and the batch that causes
    it.
    """

    kinds: dict[str, float]
    phase: str
    shape: BatchShape

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def get_scaling_setting(config: RunConfig, device: str) -> str:
    """Return the setting that memory is affine in, or "" if there is none: with 8-bit optimizers
    memory is not affine, because small tensors have states in fp32.
    """
    if config.resolve_optimizer(device) != "adamw_torch":
        return ""
    return next((name for name in SCALING_SETTINGS if name in METHODS[config.method].settings), "")


def get_scaling_value(estimator: MemoryEstimator, config: RunConfig) -> float:
    """Return the value of the scaling setting (rank, virtual tokens, width); 0 if there is none."""
    name = estimator.metadata["scaling_setting"]
    return float(getattr(config, name)) if name else 0.0


def count_chunk_rows(heads: int, length: int) -> int:
    """Return how many rows short attention processes at once."""
    return max(1, MAX_SCORE_BYTES // (4 * heads * length * length))


def count_attention_bytes(estimator: MemoryEstimator, shape: BatchShape) -> int:
    """Return the temporary bytes that short attention needs in a layer on top of torch's kernel,
    which the simulated steps use.

    Measured with the allocator's log for six shapes: 12 bytes for each score and 9 for each element
    of a query, of the rows processed at once; accurate to 10%.
    """
    heads, width = estimator.metadata["short_attention"]
    if not heads or not 1 < shape.length <= MAX_SHORT_LENGTH:
        return 0
    rows = min(shape.rows, count_chunk_rows(heads, shape.length))
    return int(rows * heads * shape.length * (12 * shape.length + 9 * width))


def find_peak_memory(
    estimator: MemoryEstimator,
    shapes: Sequence[BatchShape],
    config: RunConfig,
    *,
    is_eval: bool = False,
) -> Peak:
    """Return the highest peak over all batches, of training or of evaluation."""
    best: Peak | None = None
    extra_bytes = [count_attention_bytes(estimator, shape) for shape in shapes]
    for name, bytes_by_kind in estimator.compute_peaks(
        shapes, get_scaling_value(estimator, config)
    ).items():
        if name.startswith("eval") != is_eval:
            continue
        if name.endswith(" attention"):
            bytes_by_kind[:, MEMORY_KINDS.index("temporary")] += extra_bytes
        index = int(bytes_by_kind.sum(axis=1).argmax())
        if best is None or bytes_by_kind[index].sum() > best.total:
            best = Peak(
                dict(zip(MEMORY_KINDS, bytes_by_kind[index].tolist(), strict=True)),
                name,
                shapes[index],
            )
    assert best is not None, "an estimator has phases of training and of evaluation"
    return best
