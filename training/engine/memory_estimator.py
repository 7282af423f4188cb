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
from training.engine.methods import TABLE

# tokens; up to there a CPU attends by plain products (training/engine/modeling/short_attention.py)
LONGEST_SHORT = 128
# Of scores at once: what a core's cache holds. Without a bound, 32 rows of 128 tokens take four
# times as long.
SCORE_BYTES = 1_000_000

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A batch: rows x length tokens, padding counted, and the positions among them that have a
    loss.
    """

    rows: int
    length: int
    trained: int


def terms(shapes: Sequence[Shape], layers: float, size: float) -> Floats:
    """What a stretch's bytes are made of, shape (shapes, 17): tokens are rows x length, with
    padding.
    """
    r, t, m = (
        np.asarray([getattr(s, name) for s in shapes], dtype=float)
        for name in ("rows", "length", "trained")
    )
    one, tokens, mask = np.ones_like(r), r * t, r * t * t
    plain = [one, r, t, m, tokens, mask, t * t]
    deep = [one * layers, tokens * layers, mask * layers]
    sized = [held * size * at for held in (one, r, tokens) for at in (1, layers)]
    return np.stack([*plain, *deep, *sized, t * size], axis=1)


# Batches for the first depth and size: enough to tell the terms of a batch apart. The others need
# their corners only: the first four have three numbers of rows, or rows could not be told from
# tokens where the size changes. None has one row, with which some reshapes need no copy.
SHAPES = (
    Shape(2, 256, 64),
    Shape(4, 768, 512),
    Shape(2, 768, 64),
    Shape(3, 512, 128),
    Shape(2, 512, 64),
    Shape(5, 256, 320),
    Shape(4, 384, 192),
    Shape(3, 640, 300),
    Shape(2, 384, 700),
)
DEPTHS = (2, 3)
SIZES = (8, 24)
SIZED = ("rank", "num_virtual_tokens", "bottleneck_size")
CORNERS = {(0, 0): 9, (1, 0): 3, (0, 1): 4, (1, 1): 3}  # (depth, size) -> how many of SHAPES


@dataclass(frozen=True)
class Law:
    """`moments[name]` is (moments, terms, kinds): bytes by kind at each moment of a stretch are
    `terms(...) @ moments[name]`.
    """

    layers: int
    moments: dict[str, Floats]
    facts: dict[str, Any]

    def peaks(self, shapes: Sequence[Shape], size: float) -> dict[str, Floats]:
        """Bytes by kind at the fullest moment of each stretch, shape (shapes, kinds)."""
        given = terms(shapes, self.layers, size)
        found = {}
        for name, held in self.moments.items():
            at = np.maximum(np.einsum("st,mtk->msk", given, held), 0.0)
            found[name] = at[at.sum(axis=2).argmax(axis=0), np.arange(len(shapes))]
        return found

    def to_json(self) -> dict[str, Any]:
        held = {name: values.tolist() for name, values in self.moments.items()}
        return {"layers": self.layers, "moments": held, "facts": self.facts}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Law:
        moments = {
            name: np.asarray(values, dtype=float) for name, values in told["moments"].items()
        }
        return cls(told["layers"], moments, told["facts"])


Moments = dict[str, list[tuple[int, ...]]]  # stretch -> a row of bytes by kind for each moment
Sample = tuple[int, int, Shape, Moments]  # layers, size, batch, what a fake step told


def fit(layers: int, samples: Sequence[Sample], facts: dict[str, Any]) -> Law:
    """The law through the samples, by least squares over the terms that they can tell apart (others
    come out as zero).

    A stretch that does not have the same moments in all samples (the optimizer goes over more
    tensors in a deeper model) is taken as one moment, its fullest.
    """
    given = np.concatenate([terms([shape], at, size) for at, size, shape, _ in samples])
    scale = np.maximum(np.abs(given).max(axis=0), 1.0)
    laws = {}
    for name in set.intersection(*(set(told) for *_, told in samples)):
        held = [np.asarray(told[name], dtype=float) for *_, told in samples]
        if len({len(one) for one in held}) > 1:
            held = [one[[one.sum(axis=1).argmax()]] for one in held]
        wanted = np.stack(held)  # (samples, moments, kinds)
        flat = wanted.reshape(len(samples), -1)
        found = np.linalg.lstsq(given / scale, flat, rcond=1e-9)[0] / scale[:, None]
        laws[name] = found.reshape(-1, *wanted.shape[1:]).transpose(1, 0, 2)
    return Law(layers, {name: fullest(held, layers) for name, held in laws.items()}, facts)


def fullest(held: Floats, layers: int) -> Floats:
    """Those moments that are the fullest for some batch and size: a handful of hundreds."""
    tried = [
        Shape(r, t, max(1, int(share * r * t)))
        for r in (1, 4, 32)
        for t in (16, 128, 1024, 16384)
        for share in (0.01, 0.3, 1)
    ]
    kept: set[int] = set()
    for size in (0, 1, 16, 256, 4096):
        kept |= set(
            np.einsum("st,mtk->ms", terms(tried, layers, size), held).argmax(axis=0).tolist()
        )
    return held[sorted(kept)]


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step: bytes by kind, the stretch that it falls into and the batch
    that causes it.
    """

    kinds: dict[str, float]
    stretch: str
    shape: Shape

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def size_setting(config: RunConfig, device: str) -> str:
    """The setting that memory is affine in. There is none with 8-bit states, where small tensors
    are kept another way.
    """
    if config.optimizer_on(device) != "adamw_torch":
        return ""
    return next((name for name in SIZED if name in TABLE[config.method].settings), "")


def size_of(law: Law, config: RunConfig) -> float:
    """The setting that this law is affine in (rank, virtual tokens, width); 0 if the technique has
    none.
    """
    name = law.facts["size_setting"]
    return float(getattr(config, name)) if name else 0.0


def rows_at_once(heads: int, length: int) -> int:
    """How many rows short attention takes together."""
    return max(1, SCORE_BYTES // (4 * heads * length * length))


def attention_bytes(law: Law, shape: Shape) -> int:
    """What short attention takes in every layer beyond torch's kernel, by which the simulated steps
    attend.

    Measured (the allocator's log, six shapes): 12 bytes a score of the rows that it takes at once,
    and 9 a number of theirs in a query, within a tenth.
    """
    heads, width = law.facts["short_attention"]
    if not heads or not 1 < shape.length <= LONGEST_SHORT:
        return 0
    rows = min(shape.rows, rows_at_once(heads, shape.length))
    return int(rows * heads * shape.length * (12 * shape.length + 9 * width))


def largest(
    law: Law, shapes: Sequence[Shape], config: RunConfig, *, measuring: bool = False
) -> Peak:
    """The fullest moment over all batches, of training or of measuring."""
    best: Peak | None = None
    attention = [attention_bytes(law, shape) for shape in shapes]
    for name, held in law.peaks(shapes, size_of(law, config)).items():
        if name.startswith("eval") != measuring:
            continue
        if name.endswith(" attention"):
            held[:, KINDS.index("temporary")] += attention
        place = int(held.sum(axis=1).argmax())
        if best is None or held[place].sum() > best.total:
            best = Peak(dict(zip(KINDS, held[place].tolist(), strict=True)), name, shapes[place])
    assert best is not None, "a law has stretches of both kinds"
    return best
