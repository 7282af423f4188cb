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
MIN_SIMILARITY = 0.8  # share of equal slots
CHUNK_ROWS, CHUNK_SHINGLES = 2_000, 200_000  # what waits takes at most 20 MB
MAX_CHARACTERS = 50_000  # a longer row is judged by its beginning
WORD = re.compile(r"\w+")
SEED = 42
AnyArray = NDArray[Any]


def hash_text(text: str) -> int:
    """64 bits of a text; two of a million rows meet by chance once in 37 million files."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normalize_text(text: str) -> str:
    """A text without what does not make it another one: case and blanks."""
    return " ".join(text.lower().split())


def build_shingles(text: str) -> list[str]:
    """Three words in a row, or three characters where words are not parted by blanks."""
    parts: Sequence[str] = WORD.findall(text.lower())
    if len(parts) * 20 < len(text):
        parts = text
    return [" ".join(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))] if parts else [text]


class Signatures:
    """The signatures of rows in the order in which they are added."""

    def __init__(self) -> None:
        self.pending: list[list[str]] = []
        self.pending_shingles = 0
        self.bands: list[AnyArray] = []
        self.slots: list[AnyArray] = []

    def add_text(self, text: str) -> None:
        self.pending.append(build_shingles(text[:MAX_CHARACTERS]))
        self.pending_shingles += len(self.pending[-1])
        if len(self.pending) >= CHUNK_ROWS or self.pending_shingles > CHUNK_SHINGLES:
            self.flush_pending()

    def flush_pending(self) -> None:
        if not self.pending:
            return
        from rensa import RMinHash

        matrix = RMinHash.digest_matrix_from_token_sets(self.pending, SLOTS, SEED)
        slots = np.asarray(matrix.to_rows(), dtype=np.uint32)
        band_hashes = np.zeros((len(slots), BANDS), dtype=np.uint32)
        for column in range(SLOTS // BANDS):  # FNV-1a over the slots of a band
            band_hashes = (band_hashes ^ slots[:, column::4]) * np.uint32(16777619)
        self.bands.append(band_hashes)
        self.slots.append(slots.astype(np.uint8))
        self.pending, self.pending_shingles = [], 0

    def find_near_duplicates(self) -> AnyArray:
        """int64 of shape (rows,): the first row before this one that looks like it, or -1."""
        self.flush_pending()
        if not self.bands:
            return np.zeros(0, dtype=np.int64)
        bands, slots = np.concatenate(self.bands), np.concatenate(self.slots)
        first_similar = np.full(len(bands), -1, dtype=np.int64)
        for band in range(BANDS):
            order = np.argsort(bands[:, band], kind="stable")
            keys = bands[order, band]
            group_starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
            group_heads = np.repeat(order[group_starts], np.diff(np.r_[group_starts, len(keys)]))
            # In pieces, so that the comparison needs no second copy of all slots
            for start in range(0, len(order), 100_000):
                rows, head = order[start : start + 100_000], group_heads[start : start + 100_000]
                same = (rows != head) & (
                    (slots[rows] == slots[head]).mean(axis=1) >= MIN_SIMILARITY
                )
                better = same & ((first_similar[rows] < 0) | (head < first_similar[rows]))
                first_similar[rows[better]] = head[better]
        return first_similar


def find_repeats(digests: AnyArray) -> AnyArray:
    """bool of shape (rows,): the same content stood in an earlier row."""
    _, first = np.unique(digests, return_index=True)
    is_repeat = np.ones(len(digests), dtype=bool)
    is_repeat[first] = False
    return is_repeat
