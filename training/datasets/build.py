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
from training.datasets.similar import Numbers, repeats
from training.engine.files import fsync_path
from training.errors import UserError

HELDOUT_SHARE = 0.05
MOST_HELDOUT = 500  # of the default share; a share that a person names is taken as it is
TRAIN, HELDOUT, TEST = SPLIT_CODES["train"], SPLIT_CODES["heldout"], SPLIT_CODES["test"]
DROPPED = 9


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is done with the rows that were found. `heldout_share` None: 5 %, at most 500 rows."""

    drop_same: bool = False
    drop_alike: bool = False
    heldout_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heldout_share is not None and not 0 < self.heldout_share < 1:
            shown = f"{self.heldout_share:g}"
            raise UserError(
                f"The held-out share is {shown}; it must lie between 0 and 1, such as 0.05.",
                field="heldout_share",
            )
        if not 0 <= self.seed < 2**31:
            raise UserError(
                f"The seed is {self.seed}; it must be from 0 to 2147483647.", field="seed"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(staged: Path, choices: Choices, root: Path) -> dict[str, Any]:
    """Write the parts below `root`; returns their digest, their rows, and what was dropped or
    leaks.

    Raises:
        UserError: fewer than two rows are left.
    """
    with np.load(staged / "facts.npz") as packed:
        facts = {name: packed[name] for name in packed.files}
    split, dropped = assign(facts, choices)
    rows = {name: int((split == SPLIT_CODES[name]).sum()) for name in SPLITS}
    if not rows["train"] or not rows["heldout"]:
        usable = sum(rows.values())
        raise UserError(
            f"There {'is' if usable == 1 else 'are'} {usable} usable "
            f"row{'' if usable == 1 else 's'}; at least 2 different ones are needed, one to train "
            "on and one held out.",
            field="file",
        )
    return {
        "digest": write(staged, split, root),
        "rows": rows,
        "dropped": dropped,
        "leaks": leaks(facts, split),
    }


def assign(facts: dict[str, Any], choices: Choices) -> tuple[Numbers, dict[str, int]]:
    """The split of every row (uint8), equal rows always on one side; DROPPED for those that are
    left out.

    What a person holds out stays as it is: rows leave training, never the held-out or test part,
    but for repeats within one.
    """
    split = facts["split"].copy()
    dropped = {"same": 0, "alike": 0, "in_both": 0}
    for kept, other in ((TEST, (HELDOUT, TRAIN, 0)), (HELDOUT, (TRAIN, 0))):
        seen = facts["content"][split == kept]
        dropped["in_both"] += drop(split, np.isin(facts["content"], seen) & np.isin(split, other))
    if choices.drop_same:
        for part in ((TRAIN, 0), (HELDOUT,), (TEST,)):
            inside = np.flatnonzero(np.isin(split, part))
            again = np.zeros(len(split), dtype=bool)
            again[inside[repeats(facts["content"][inside])]] = True
            dropped["same"] += drop(split, again)
    if choices.drop_alike:
        root = roots(facts["alike"])
        away = np.zeros(len(split), dtype=bool)
        away[root[np.isin(split, (HELDOUT, TEST))]] = True  # groups that have a row held out
        same = facts["content"] == facts["content"][root]
        dropped["alike"] = drop(
            split, np.isin(split, (TRAIN, 0)) & (away[root] | ((facts["alike"] >= 0) & ~same))
        )
    if not (facts["split"] == HELDOUT).any():
        draw_heldout(split, facts["content"], choices)
    split[split == 0] = TRAIN
    return split, dropped


def roots(alike: Numbers) -> Numbers:
    """int64 of shape (rows,): the first row of the group that looks like a row; its own number if
    it stands alone.
    """
    root = np.where(alike >= 0, alike, np.arange(len(alike)))
    while not np.array_equal(further := root[root], root):
        root = further
    return root


def drop(split: Numbers, which: Numbers) -> int:
    which = which & (split != DROPPED)
    split[which] = DROPPED
    return int(which.sum())


def draw_heldout(split: Numbers, content: Numbers, choices: Choices) -> None:
    """Draw whole groups of equal rows until the share is reached; from rows without a split if
    there are any.
    """
    pool = np.flatnonzero(split == 0)
    if len(np.unique(content[pool])) < 2:  # none to draw from: all rows may be drawn
        pool = np.flatnonzero((split == 0) | (split == TRAIN))
    if len(pool) < 2:
        return
    groups, member = np.unique(content[pool], return_inverse=True)
    sizes = np.bincount(member)
    share = choices.heldout_share or HELDOUT_SHARE
    wanted = max(1, round(share * len(pool)))
    if choices.heldout_share is None:
        wanted = min(wanted, MOST_HELDOUT)
    order = list(range(len(groups)))
    random.Random(choices.seed).shuffle(order)
    chosen = np.zeros(len(groups), dtype=bool)
    got = 0
    for group in order[:-1]:  # one group at least is left to train on
        if got >= wanted:
            break
        chosen[group] = True
        got += int(sizes[group])
    split[pool[chosen[member]]] = HELDOUT


def leaks(facts: dict[str, Any], split: Numbers) -> dict[str, int]:
    """Held-out and test rows that training could answer by heart: the same prompt, or a row that
    looks alike.
    """
    away = (split == HELDOUT) | (split == TEST)
    prompts = np.isin(facts["prompt"], facts["prompt"][split == TRAIN]) & away
    root = roots(facts["alike"])
    trained = np.zeros(len(split), dtype=bool)
    trained[root[split == TRAIN]] = True  # groups that have a row to train on
    similar = away & trained[root]
    return {
        "prompts": int(prompts.sum()),
        "alike": int((similar & ~prompts).sum()),
        "of": int(away.sum()),
    }


def write(staged: Path, split: Numbers, root: Path) -> str:
    """One JSONL a split under the SHA-256 of their content; the same content is stored once."""
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".build-", dir=root))
    try:
        files = {SPLIT_CODES[name]: (aside / f"{name}.jsonl").open("wb") for name in SPLITS}
        with (staged / "rows.jsonl").open("rb") as rows:
            for code, line in zip(split.tolist(), rows, strict=True):
                if code != DROPPED:
                    files[code].write(line)
        for file in files.values():
            file.close()
        digest = hashlib.sha256()
        for name in SPLITS:
            digest.update(b"\0" if name != "train" else b"")
            with (aside / f"{name}.jsonl").open("rb") as written:
                while piece := written.read(2**20):
                    digest.update(piece)
            fsync_path(aside / f"{name}.jsonl")
        final = root / digest.hexdigest()
        if not final.exists():
            aside.rename(final)
        return digest.hexdigest()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
