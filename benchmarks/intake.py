"""Measure time and memory to check and save uploads: a million rows of JSON Lines, and a file of
2 GiB.

The work runs in its own process, as for a real upload; its peak memory is the kernel's figure.
`--rows N` sets another number of rows.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report

ROOT = Path(__file__).parent.parent
GIB = 2**30
FORMAT = {"kind": "jsonl", "zipped": False, "delimiter": ",", "header": True, "unit": "paragraph"}
MAPPING = {
    "row_format": "pairs",
    "columns": {"prompt": "prompt", "completion": "completion"},
    "split": "",
    "is_certain": True,
}


def write_rows(path: Path, rows: int, words_per_row: int) -> None:
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(5000)]
    with path.open("w") as out:
        for _ in range(rows):
            text = rng.choices(vocabulary, k=words_per_row)
            half = len(text) * 2 // 3
            out.write(
                json.dumps({"prompt": " ".join(text[:half]), "completion": " ".join(text[half:])})
                + "\n"
            )


def run_program(action: str, folder: Path, params: dict[str, Any]) -> tuple[float, float]:
    """Run a step of the upload program. Returns seconds and peak memory in MB."""
    began = time.monotonic()
    code = (
        "import json, resource, sys; from pathlib import Path; from training.datasets.program "
        "import run_action; run_action(sys.argv[1], Path(sys.argv[2]), json.load(sys.stdin)); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, action, str(folder)],
        input=json.dumps(params),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return time.monotonic() - began, int(process.stdout.rsplit("peak ", 1)[1]) * 1024 / 1e6


def measure_intake(rows: int, words_per_row: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_rows(folder / "0", rows, words_per_row)
        size = (folder / "0").stat().st_size
        params = {
            "files": [{"file": "0", "name": "a.jsonl", "split": "", "format": FORMAT}],
            "mapping": MAPPING,
            "build_options": {},
            "root": str(folder / "data"),
            "max_bytes": 8 * GIB,
        }
        check_seconds, check_mb = run_program("check", folder, params)
        save_seconds, save_mb = run_program("save", folder, params)
    return {
        "file_gib": round(size / GIB, 2),
        "rows": rows,
        "rows_per_second": round(rows / check_seconds),
        "save_rows_per_second": round(rows / save_seconds),
        "peak_mb": round(max(check_mb, save_mb)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    small = measure_intake(arguments.rows, 30)
    # A tenth of the rows with 21 kB each: 2 GiB for a million
    large = measure_intake(arguments.rows // 10, 3250)
    print_report(small | {f"long_rows_{name}": value for name, value in large.items()})


if __name__ == "__main__":
    main()
