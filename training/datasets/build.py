"""Second pass: staged rows -> train, held-out and test files under the hash of their content. It
knows no ORM.
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
MAX_DEFAULT_EVAL_ROWS = 500  # of the default share; a share that a person names is taken as it is
TRAIN, EVAL, TEST = SPLIT_CODES["train"], SPLIT_CODES["eval"], SPLIT_CODES["test"]
DROPPED = 9


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What is done with the rows that were found. `eval_share` None: 5 %, at most 500 rows."""

    drop_duplicates: bool = False
    drop_near_duplicates: bool = False
    eval_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            share_text = f"{self.eval_share:g}"
            raise UserError(
                f"The held-out share is {share_text}; it must lie between 0 and 1, such as 0.05.",
                field="eval_share",
            )
        if not 0 <= self.seed < 2**31:
            raise UserError(
                f"The seed is {self.seed}; it must be from 0 to 2147483647.", field="seed"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_version(staging_folder: Path, options: BuildOptions, data_folder: Path) -> dict[str, Any]:
    """Write the parts below `root`; returns their digest, their rows, and what was dropped or
    leaks.

    Raises:
        UserError: fewer than two rows are left.
    """
    with np.load(staging_folder / "facts.npz") as packed:
        facts = {name: packed[name] for name in packed.files}
    split, dropped = assign_splits(facts, options)
    rows = {name: int((split == SPLIT_CODES[name]).sum()) for name in SPLITS}
    if not rows["train"] or not rows["eval"]:
        usable = sum(rows.values())
        raise UserError(
            f"There {'is' if usable == 1 else 'are'} {usable} usable "
            f"row{'' if usable == 1 else 's'}; at least 2 different ones are needed, one to train "
            "on and one held out.",
            field="file",
        )
    return {
        "digest": write_split_files(staging_folder, split, data_folder),
        "rows": rows,
        "dropped": dropped,
        "leaks": count_leaks(facts, split),
    }


def assign_splits(facts: dict[str, Any], options: BuildOptions) -> tuple[AnyArray, dict[str, int]]:
    """The split of every row (uint8), equal rows always on one side; DROPPED for those that are
    left out.

    What a person holds out stays as it is: rows leave training, never the held-out or test part,
    but for repeats within one.
    """
    split = facts["split"].copy()
    dropped = {"same": 0, "alike": 0, "in_both": 0}
    for reference, affected in ((TEST, (EVAL, TRAIN, 0)), (EVAL, (TRAIN, 0))):
        reference_content = facts["content"][split == reference]
        dropped["in_both"] += drop_rows(
            split, np.isin(facts["content"], reference_content) & np.isin(split, affected)
        )
    if options.drop_duplicates:
        for part in ((TRAIN, 0), (EVAL,), (TEST,)):
            members = np.flatnonzero(np.isin(split, part))
            is_repeat = np.zeros(len(split), dtype=bool)
            is_repeat[members[find_repeats(facts["content"][members])]] = True
            dropped["same"] += drop_rows(split, is_repeat)
    if options.drop_near_duplicates:
        root = find_group_roots(facts["alike"])
        has_eval_row = np.zeros(len(split), dtype=bool)
        has_eval_row[root[np.isin(split, (EVAL, TEST))]] = True  # groups that have a row held out
        same_as_root = facts["content"] == facts["content"][root]
        dropped["alike"] = drop_rows(
            split,
            np.isin(split, (TRAIN, 0))
            & (has_eval_row[root] | ((facts["alike"] >= 0) & ~same_as_root)),
        )
    if not (facts["split"] == EVAL).any():
        draw_eval_rows(split, facts["content"], options)
    split[split == 0] = TRAIN
    return split, dropped


def find_group_roots(near_duplicate_of: AnyArray) -> AnyArray:
    """int64 of shape (rows,): the first row of the group that looks like a row; its own number if
    it stands alone.
    """
    root = np.where(near_duplicate_of >= 0, near_duplicate_of, np.arange(len(near_duplicate_of)))
    while not np.array_equal(next_root := root[root], root):
        root = next_root
    return root


def drop_rows(split: AnyArray, mask: AnyArray) -> int:
    mask = mask & (split != DROPPED)
    split[mask] = DROPPED
    return int(mask.sum())


def draw_eval_rows(split: AnyArray, content: AnyArray, options: BuildOptions) -> None:
    """Draw whole groups of equal rows until the share is reached; from rows without a split if
    there are any.
    """
    pool = np.flatnonzero(split == 0)
    if len(np.unique(content[pool])) < 2:  # none to draw from: all rows may be drawn
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
    for group in order[:-1]:  # one group at least is left to train on
        if drawn_count >= target_count:
            break
        chosen[group] = True
        drawn_count += int(sizes[group])
    split[pool[chosen[group_index]]] = EVAL


def count_leaks(facts: dict[str, Any], split: AnyArray) -> dict[str, int]:
    """Held-out and test rows that training could answer by heart: the same prompt, or a row that
    looks alike.
    """
    is_eval = (split == EVAL) | (split == TEST)
    has_train_prompt = np.isin(facts["prompt"], facts["prompt"][split == TRAIN]) & is_eval
    root = find_group_roots(facts["alike"])
    has_train_row = np.zeros(len(split), dtype=bool)
    has_train_row[root[split == TRAIN]] = True  # groups that have a row to train on
    similar = is_eval & has_train_row[root]
    return {
        "prompts": int(has_train_prompt.sum()),
        "alike": int((similar & ~has_train_prompt).sum()),
        "of": int(is_eval.sum()),
    }


def write_split_files(staging_folder: Path, split: AnyArray, data_folder: Path) -> str:
    """One JSONL a split under the SHA-256 of their content; the same content is stored once."""
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
