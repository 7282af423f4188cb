"""Second pass over an upload: split the staged rows into train, eval and test files, stored under
the hash of their content. No ORM here.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.datasets.check import SPLIT_CODES
from training.datasets.rows import SPLITS
from training.datasets.similar import AnyArray, find_repeats
from training.engine.files import fsync_path
from training.errors import UserError

DEFAULT_EVAL_SHARE = 0.05
MAX_DEFAULT_EVAL_ROWS = 500  # limits the default share only, not a share set by the user
TRAIN, EVAL, TEST = SPLIT_CODES["train"], SPLIT_CODES["eval"], SPLIT_CODES["test"]
DROPPED = 9


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build a version from the checked rows. `eval_share` None: 5%, at most 500 rows."""

    drop_duplicates: bool = False
    drop_near_duplicates: bool = False
    eval_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            share_text = f"{self.eval_share:g}"
            raise UserError(
                f"The held-out share is {share_text}; it must be between 0 and 1, such as 0.05.",
                field="eval_share",
            )
        if not 0 <= self.seed < 2**31:
            raise UserError(
                f"The seed is {self.seed}; it must be from 0 to 2147483647.", field="seed"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_version(staging_folder: Path, options: BuildOptions, data_folder: Path) -> dict[str, Any]:
    """Write the split files below `data_folder`. Returns their digest, the rows of each split, the
    rows that were dropped, and the leaks.

    Raises:
        UserError: fewer than two usable rows.
    """
    with np.load(staging_folder / "facts.npz") as packed:
        facts = {name: packed[name] for name in packed.files}
    split, dropped = assign_splits(facts, options)
    rows = {name: int((split == SPLIT_CODES[name]).sum()) for name in SPLITS}
    if not rows["train"] or not rows["eval"]:
        usable = sum(rows.values())
        raise UserError(
            f"Only {usable} usable row{'' if usable == 1 else 's'}; at least 2 different rows are "
            "needed, one for training and one held out.",
            field="file",
            code="too_few_rows",
        )
    return {
        "digest": write_split_files(staging_folder, split, data_folder),
        "rows": rows,
        "dropped": dropped,
        "leaks": count_leaks(facts, split),
    }


def assign_splits(facts: dict[str, Any], options: BuildOptions) -> tuple[AnyArray, dict[str, int]]:
    """Assign every row to a split (uint8); duplicates always share a split, and DROPPED marks rows
    that are left out.

    Rows that the user assigned to eval or test stay there. If a row is also in another split, it is
    removed from the training split. Only duplicates within a split can remove eval or test rows.
    """
    split = facts["split"].copy()
    dropped = {"duplicates": 0, "near_duplicates": 0, "cross_split": 0}
    for reference, affected in ((TEST, (EVAL, TRAIN, 0)), (EVAL, (TRAIN, 0))):
        reference_content = facts["content"][split == reference]
        dropped["cross_split"] += drop_rows(
            split, np.isin(facts["content"], reference_content) & np.isin(split, affected)
        )
    if options.drop_duplicates:
        for part in ((TRAIN, 0), (EVAL,), (TEST,)):
            members = np.flatnonzero(np.isin(split, part))
            is_repeat = np.zeros(len(split), dtype=bool)
            is_repeat[members[find_repeats(facts["content"][members])]] = True
            dropped["duplicates"] += drop_rows(split, is_repeat)
    if options.drop_near_duplicates:
        root = find_group_roots(facts["first_similar"])
        has_eval_row = np.zeros(len(split), dtype=bool)
        has_eval_row[root[np.isin(split, (EVAL, TEST))]] = True  # groups with an eval or test row
        same_as_root = facts["content"] == facts["content"][root]
        dropped["near_duplicates"] = drop_rows(
            split,
            np.isin(split, (TRAIN, 0))
            & (has_eval_row[root] | ((facts["first_similar"] >= 0) & ~same_as_root)),
        )
    if not (facts["split"] == EVAL).any():
        draw_eval_rows(split, facts["content"], options)
    split[split == 0] = TRAIN
    return split, dropped


def find_group_roots(first_similar: AnyArray) -> AnyArray:
    """int64 of shape (rows,): the first row of each row's near-duplicate group; a row without one
    is its own root.
    """
    root = np.where(first_similar >= 0, first_similar, np.arange(len(first_similar)))
    while not np.array_equal(next_root := root[root], root):
        root = next_root
    return root


def drop_rows(split: AnyArray, mask: AnyArray) -> int:
    """Mark the rows of `mask` as dropped, in place. Returns how many were not dropped before."""
    mask = mask & (split != DROPPED)
    split[mask] = DROPPED
    return int(mask.sum())


def draw_eval_rows(split: AnyArray, content: AnyArray, options: BuildOptions) -> None:
    """Draw whole groups of duplicates for the eval split until its share is reached. Rows without a
    split are drawn first; rows marked as train only if there are no others.
    """
    pool = np.flatnonzero(split == 0)
    if len(np.unique(content[pool])) < 2:  # too few rows without a split
        pool = np.flatnonzero((split == 0) | (split == TRAIN))
    if len(pool) < 2:
        return
    groups, group_index = np.unique(content[pool], return_inverse=True)
    sizes = np.bincount(group_index)
    share = options.eval_share or DEFAULT_EVAL_SHARE
    target_count = max(1, round(share * len(pool)))
    if options.eval_share is None:
        target_count = min(target_count, MAX_DEFAULT_EVAL_ROWS)
    order = list(range(len(groups)))
    random.Random(options.seed).shuffle(order)
    chosen = np.zeros(len(groups), dtype=bool)
    drawn_count = 0
    for group in order[:-1]:  # at least one group stays in training
        if drawn_count >= target_count:
            break
        chosen[group] = True
        drawn_count += int(sizes[group])
    split[pool[chosen[group_index]]] = EVAL


def count_leaks(facts: dict[str, Any], split: AnyArray) -> dict[str, int]:
    """Count eval and test rows that the model may memorize from training rows: rows with the same
    prompt, and near-duplicates.
    """
    is_eval = (split == EVAL) | (split == TEST)
    has_train_prompt = np.isin(facts["prompt"], facts["prompt"][split == TRAIN]) & is_eval
    root = find_group_roots(facts["first_similar"])
    has_train_row = np.zeros(len(split), dtype=bool)
    has_train_row[root[split == TRAIN]] = True  # groups with a training row
    similar = is_eval & has_train_row[root]
    return {
        "prompts": int(has_train_prompt.sum()),
        "near_duplicates": int((similar & ~has_train_prompt).sum()),
        "total": int(is_eval.sum()),
    }


def write_split_files(staging_folder: Path, split: AnyArray, data_folder: Path) -> str:
    """Write one JSONL file per split into a folder named by the SHA-256 of their content. Equal
    content is stored once.
    """
    data_folder.mkdir(parents=True, exist_ok=True)
    temporary_folder = Path(tempfile.mkdtemp(prefix=".build-", dir=data_folder))
    try:
        files = {
            SPLIT_CODES[name]: (temporary_folder / f"{name}.jsonl").open("wb") for name in SPLITS
        }
        with (staging_folder / "rows.jsonl").open("rb") as rows:
            for code, line in zip(split.tolist(), rows, strict=True):
                if code != DROPPED:
                    files[code].write(line)
        for file in files.values():
            file.close()
        digest = hashlib.sha256()
        for name in SPLITS:
            digest.update(b"\0" if name != "train" else b"")
            with (temporary_folder / f"{name}.jsonl").open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
            fsync_path(temporary_folder / f"{name}.jsonl")
        final = data_folder / digest.hexdigest()
        if not final.exists():
            temporary_folder.rename(final)
        return digest.hexdigest()
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)
