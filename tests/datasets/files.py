"""Runs the program's detection and check on one file, in this process."""

import contextlib
import io
import json

from training.datasets import program
from training.datasets.check import Source, check_sources
from training.datasets.column_mapping import ColumnMapping
from training.datasets.formats import Format

MAX_BYTES = 2**30


def detect(folder, content, name):
    """The files and the mapping that the program detects."""
    (folder / "0").write_bytes(content)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        program.run_detect(
            folder, {"files": [{"file": "0", "name": name, "split": ""}], "max_bytes": MAX_BYTES}
        )
    return json.loads(out.getvalue().splitlines()[-1])["detected"]


def detect_and_check(folder, content, name):
    """The report of the check under the guessed mapping."""
    detected = detect(folder, content, name)
    sources = [
        Source(folder / file["file"], Format(**file["format"]), file["split"], file["name"])
        for file in detected["files"]
    ]
    return check_sources(
        sources,
        ColumnMapping.from_dict(detected["mapping"]),
        folder,
        max_bytes=MAX_BYTES,
        report_progress=lambda *_: None,
    )


def read_staged(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
