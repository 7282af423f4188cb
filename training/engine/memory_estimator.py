"""How a step's memory grows: from a few simulated steps to any batch. No torch here: the site
evaluates it while a slider moves.

What is alive after one operator is affine in each of: layers, the technique's size (rank, virtual
tokens, width), rows x tokens, trained positions; and where there is a mask, in rows x tokens
squared. That is true of one moment and not of the fullest one, which jumps between moments, so each
moment has a law of its own and the largest value is taken at the end. Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.config import RunConfig
from training.engine.methods import METHODS

# tokens; up to there a CPU attends by plain products (training/engine/modeling/short_attention.py)
MAX_SHORT_LENGTH = 128
# Of scores at once: what a core's cache holds. Without a bound, 32 rows of 128 tokens take four
# times as long.
MAX_SCORE_BYTES = 1_000_000

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BatchShape:
    """A batch: rows x length tokens, padding counted, and the positions among them that have a
    loss.
    """

    rows: int
    length: int
    trained_tokens: int


def build_features(shapes: Sequence[BatchShape], layers: float, size: float) -> Floats:
    """What a stretch's bytes are made of, shape (shapes, 17): tokens are rows x length, with
    padding.
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


# Batches for the first depth and size: enough to tell the terms of a batch apart. The others need
# their corners only: the first four have three numbers of rows, or rows could not be told from
# tokens where the size changes. None has one row, with which some reshapes need no copy.
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
SHAPES_PER_CORNER = {
    (0, 0): 9,
    (1, 0): 3,
    (0, 1): 4,
    (1, 1): 3,
}  # (depth, size) -> how many of SHAPES


@dataclass(frozen=True)
class MemoryEstimator:
    """`moments[name]` is (moments, terms, kinds): bytes by kind at each moment of a stretch are
    `terms(...) @ moments[name]`.
    """

    layers: int
    snapshots: dict[str, Floats]
    metadata: dict[str, Any]

    def compute_peaks(self, shapes: Sequence[BatchShape], size: float) -> dict[str, Floats]:
        """Bytes by kind at the fullest moment of each stretch, shape (shapes, kinds)."""
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


Snapshots = dict[str, list[tuple[int, ...]]]  # stretch -> a row of bytes by kind for each moment
Sample = tuple[int, int, BatchShape, Snapshots]  # layers, size, batch, what a fake step told


def fit_least_squares(
    layers: int, samples: Sequence[Sample], metadata: dict[str, Any]
) -> MemoryEstimator:
    """The law through the samples, by least squares over the terms that they can tell apart (others
    come out as zero).

    A stretch that does not have the same moments in all samples (the optimizer goes over more
    tensors in a deeper model) is taken as one moment, its fullest.
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
        targets = np.stack(measured)  # (samples, moments, kinds)
        flat = targets.reshape(len(samples), -1)
        solution = np.linalg.lstsq(features / scale, flat, rcond=1e-9)[0] / scale[:, None]
        coefficients[name] = solution.reshape(-1, *targets.shape[1:]).transpose(1, 0, 2)
    return MemoryEstimator(
        layers,
        {name: prune_dominated(array, layers) for name, array in coefficients.items()},
        metadata,
    )


def prune_dominated(coefficients: Floats, layers: int) -> Floats:
    """Those moments that are the fullest for some batch and size: a handful of hundreds."""
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
    """The fullest moment of a step: bytes by kind, the stretch that it falls into and the batch
    that causes it.
    """

    kinds: dict[str, float]
    phase: str
    shape: BatchShape

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def get_scaling_setting(config: RunConfig, device: str) -> str:
    """The setting that memory is affine in. There is none with 8-bit states, where small tensors
    are kept another way.
    """
    if config.resolve_optimizer(device) != "adamw_torch":
        return ""
    return next((name for name in SCALING_SETTINGS if name in METHODS[config.method].settings), "")


def get_scaling_value(estimator: MemoryEstimator, config: RunConfig) -> float:
    """The setting that this law is affine in (rank, virtual tokens, width); 0 if the technique has
    none.
    """
    name = estimator.metadata["scaling_setting"]
    return float(getattr(config, name)) if name else 0.0


def count_chunk_rows(heads: int, length: int) -> int:
    """How many rows short attention takes together."""
    return max(1, MAX_SCORE_BYTES // (4 * heads * length * length))


def count_attention_bytes(estimator: MemoryEstimator, shape: BatchShape) -> int:
    """What short attention takes in every layer beyond torch's kernel, by which the simulated steps
    attend.

    Measured (the allocator's log, six shapes): 12 bytes a score of the rows that it takes at once,
    and 9 a number of theirs in a query, within a tenth.
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
    """The fullest moment over all batches, of training or of measuring."""
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
    assert best is not None, "a law has stretches of both kinds"
    return best
