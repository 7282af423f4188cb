"""Finds duplicate and near-duplicate rows. No files and no ORM here.

Signatures are R-MinHash (rensa) over three-word shingles. 64 bytes are stored per row: eight band
hashes of 4 bytes to find candidates, and the low byte of each of 32 slots to verify them (b-bit
MinHash, Li and König 2010). A million rows take 64 MB; rensa's own index takes 1.4 GB.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Four slots per band: 98% of the pairs that share 80% of their shingles match in some band
SLOTS, BANDS = 32, 8
MIN_SIMILARITY = 0.8  # fraction of equal slots
CHUNK_ROWS, CHUNK_SHINGLES = 2_000, 200_000  # pending rows take at most 20 MB
MAX_CHARACTERS = 50_000  # longer rows are compared by their beginning
WORD = re.compile(r"\w+")
SEED = 42
AnyArray = NDArray[Any]


def hash_text(text: str) -> int:
    """64-bit hash of a text. One in 37 million files of a million rows has a collision."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normalize_text(text: str) -> str:
    """The text in lower case with single spaces, to compare prompts."""
    return " ".join(text.lower().split())


def build_shingles(text: str) -> list[str]:
    """All runs of three words, or of three characters if words are not separated by spaces."""
    parts: Sequence[str] = WORD.findall(text.lower())
    if len(parts) * 20 < len(text):
        parts = text
    return [" ".join(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))] if parts else [text]


class Signatures:
    """The MinHash signatures of rows, in the order in which they were added."""

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
        """int64 of shape (rows,): the first earlier row that is similar to each row, or -1."""
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
            # In chunks, so that the comparison needs no second copy of all slots
            for start in range(0, len(order), 100_000):
                rows, head = order[start : start + 100_000], group_heads[start : start + 100_000]
                same = (rows != head) & (
                    (slots[rows] == slots[head]).mean(axis=1) >= MIN_SIMILARITY
                )
                better = same & ((first_similar[rows] < 0) | (head < first_similar[rows]))
                first_similar[rows[better]] = head[better]
        return first_similar


def find_repeats(digests: AnyArray) -> AnyArray:
    """bool of shape (rows,): True if an earlier row has the same content."""
    _, first = np.unique(digests, return_index=True)
    is_repeat = np.ones(len(digests), dtype=bool)
    is_repeat[first] = False
    return is_repeat
