"""From lines to an immutable version of a data set: checked, split, written under the hash of its content."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from django.db import transaction

from training.datasets.models import Dataset, DatasetVersion
from training.datasets.rows import MAX_LINE_BYTES, BadRow, Row, parse_line
from training.engine.files import sync
from training.errors import TooLarge, UserError, one_line
from training.people.models import User

SHOWN_PROBLEMS = 100
MAX_ROWS = 500_000  # a row takes about 600 bytes in memory here: 300 MB
HELDOUT_SHARE = 0.05
HELDOUT_ROWS = (1, 500)  # never fewer, never more
SPLIT_SEED = 0
SPLIT_NAMES = ("train", "heldout", "test")


class BadData(UserError):
    """The file holds faulty lines; `problems` are the first hundred, `count` is their number."""

    def __init__(self, message: str, problems: list[str], count: int) -> None:
        super().__init__(message)
        self.problems = problems
        self.count = count


@dataclass
class Checked:
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    count: int = 0


def check_lines(lines: Iterable[bytes]) -> Checked:
    """Every row, and of every faulty line its number and reason (the first SHOWN_PROBLEMS are kept)."""
    checked = Checked()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(checked.rows) >= MAX_ROWS:
            raise TooLarge(f"The file has more than {MAX_ROWS:,} rows; split it.", field="file")
        try:
            checked.rows.append(parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line))
        except BadRow as bad:
            checked.count += 1
            if len(checked.problems) < SHOWN_PROBLEMS:
                checked.problems.append(f"line {number}: {bad.message}")
    return checked


def bounded_lines(file: BinaryIO) -> Iterable[bytes]:
    """Lines of a file; of a line past the limit only its beginning, so that memory stays bounded."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        yield line


def create_dataset(
    user: User, name: str, lines: Iterable[bytes], *, source: str, licence: str = "", leave_out: bool = False
) -> DatasetVersion:
    """Check lines and store them as version 1 of a new data set.

    Raises:
        BadData: faulty lines, unless `leave_out` says to go on without them.
        UserError: no name, or no rows left.
    """
    if not name.strip():
        raise UserError("The data set needs a name.", field="name")
    checked = check_lines(lines)
    if not leave_out:
        refuse_faulty(checked)
    parts = split_rows(checked.rows)
    if not parts["train"] or not parts["heldout"]:
        raise UserError(
            f"There are {len(checked.rows)} usable rows; at least 2 are needed, one to train and one held out.",
            field="file",
        )
    digest = write_parts(parts)
    with transaction.atomic():
        dataset = Dataset.objects.create(
            owner=user,
            team=user.first_team(),
            name=one_line(name)[:120],
            source=one_line(source),
            licence=licence,
        )
        return DatasetVersion.objects.create(
            dataset=dataset,
            number=1,
            digest=digest,
            rows=len(checked.rows),
            train_rows=len(parts["train"]),
            heldout_rows=len(parts["heldout"]),
            test_rows=len(parts["test"]),
            left_out=checked.count,
            problems=checked.problems,
        )


def refuse_faulty(checked: Checked) -> None:
    """Raises BadData if there is a faulty line."""
    if checked.count:
        rows = f"{checked.count:,} of {checked.count + len(checked.rows):,} rows"
        raise BadData(f"{rows} cannot be used. Correct the file, or leave them out.", checked.problems, checked.count)


def split_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """By the rows' own split where they name one; held-out rows are drawn from the rest if none is named."""
    parts: dict[str, list[Row]] = {name: [row for row in rows if row.split == name] for name in SPLIT_NAMES}
    free = [row for row in rows if not row.split]
    if not parts["heldout"]:
        pool = free or parts["train"]
        low, high = HELDOUT_ROWS
        count = min(max(low, round(HELDOUT_SHARE * len(pool))), high)
        drawn = set(random.Random(SPLIT_SEED).sample(range(len(pool)), min(count, max(0, len(pool) - 1))))
        parts["heldout"] = [row for i, row in enumerate(pool) if i in drawn]
        rest = [row for i, row in enumerate(pool) if i not in drawn]
        parts["train"] = parts["train"] + rest if free else rest
    else:
        parts["train"] += free
    return parts


def write_parts(parts: dict[str, list[Row]]) -> str:
    """Write one JSONL a split under the SHA-256 of their content; the same content is stored once."""
    texts = {
        name: "".join(json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n" for row in rows).encode()
        for name, rows in parts.items()
    }
    digest = hashlib.sha256(b"\0".join(texts[name] for name in SPLIT_NAMES)).hexdigest()
    root = Path(settings.HOME) / "data"
    final, aside = root / digest, root / f".{digest}"
    if final.exists():
        return digest
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, text in texts.items():
        (aside / f"{name}.jsonl").write_bytes(text)
        sync(aside / f"{name}.jsonl")
    aside.rename(final)
    return digest
