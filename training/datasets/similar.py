"""Rows that are the same, and rows that look alike. It knows numbers and text, no files and no ORM.

Signatures are rensa's R-MinHash over three-word shingles. Kept of a row are 64 bytes: eight band
hashes of 4 bytes to find candidates, and the low byte of each of 32 slots to check them (b-bit
MinHash, Li and Koenig 2010), so a million rows take 64 MB; rensa's own index takes 1.4 GB for them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Four slots a band: of rows that share 80 % of their shingles 98 % meet in a band
SLOTS, BANDS = (
    32,
    8,
)
ALIKE = 0.8  # share of equal slots
CHUNK_ROWS, CHUNK_SHINGLES = 2_000, 200_000  # what waits takes at most 20 MB
MOST_CHARACTERS = 50_000  # a longer row is judged by its beginning
WORD = re.compile(r"\w+")
SEED = 42
Numbers = NDArray[Any]


def digest64(text: str) -> int:
    """64 bits of a text; two of a million rows meet by chance once in 37 million files."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def folded(text: str) -> str:
    """A text without what does not make it another one: case and blanks."""
    return " ".join(text.lower().split())


def shingles(text: str) -> list[str]:
    """Three words in a row, or three characters where words are not parted by blanks."""
    parts: Sequence[str] = WORD.findall(text.lower())
    if len(parts) * 20 < len(text):
        parts = text
    return [" ".join(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))] if parts else [text]


class Signatures:
    """The signatures of rows in the order in which they are added."""

    def __init__(self) -> None:
        self.waiting: list[list[str]] = []
        self.size = 0
        self.bands: list[Numbers] = []
        self.slots: list[Numbers] = []

    def add(self, text: str) -> None:
        self.waiting.append(shingles(text[:MOST_CHARACTERS]))
        self.size += len(self.waiting[-1])
        if len(self.waiting) >= CHUNK_ROWS or self.size > CHUNK_SHINGLES:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        from rensa import RMinHash

        matrix = RMinHash.digest_matrix_from_token_sets(self.waiting, SLOTS, SEED)
        slots = np.asarray(matrix.to_rows(), dtype=np.uint32)
        mixed = np.zeros((len(slots), BANDS), dtype=np.uint32)
        for column in range(SLOTS // BANDS):  # FNV-1a over the slots of a band
            mixed = (mixed ^ slots[:, column::4]) * np.uint32(16777619)
        self.bands.append(mixed)
        self.slots.append(slots.astype(np.uint8))
        self.waiting, self.size = [], 0

    def alike(self) -> Numbers:
        """int64 of shape (rows,): the first row before this one that looks like it, or -1."""
        self.flush()
        if not self.bands:
            return np.zeros(0, dtype=np.int64)
        bands, slots = np.concatenate(self.bands), np.concatenate(self.slots)
        found = np.full(len(bands), -1, dtype=np.int64)
        for band in range(BANDS):
            order = np.argsort(bands[:, band], kind="stable")
            keys = bands[order, band]
            begins = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
            heads = np.repeat(order[begins], np.diff(np.r_[begins, len(keys)]))
            # In pieces, so that the comparison needs no second copy of all slots
            for at in range(0, len(order), 100_000):
                rows, head = order[at : at + 100_000], heads[at : at + 100_000]
                same = (rows != head) & ((slots[rows] == slots[head]).mean(axis=1) >= ALIKE)
                better = same & ((found[rows] < 0) | (head < found[rows]))
                found[rows[better]] = head[better]
        return found


def repeats(digests: Numbers) -> Numbers:
    """bool of shape (rows,): the same content stood in an earlier row."""
    _, first = np.unique(digests, return_index=True)
    again = np.ones(len(digests), dtype=bool)
    again[first] = False
    return again
