"""What a program that trains, forecasts or merges pays for its imports: as Python does them, and
within `fast_imports`, in turn.

CPU seconds (user and system) and peak memory of a fresh process that imports what the engine does;
the least of several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import report

ROOT = Path(__file__).parent.parent
ROUNDS = 5
WAYS = {
    "plain": "import training.engine.train.attempt",
    "quick": "from training.engine.fast_imports import fast_imports\nwith fast_imports():\n    "
    "import training.engine.train.attempt",
}
TELL = (
    "\nimport resource\nused = resource.getrusage(resource.RUSAGE_SELF)\nprint(used.ru_utime + "
    "used.ru_stime, used.ru_maxrss)"
)


def main() -> None:
    told: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    bare = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    for _ in range(ROUNDS):
        for way, code in WAYS.items():
            command = [sys.executable, "-W", "ignore", "-c", code + TELL]
            done = subprocess.run(
                command, cwd=ROOT, env=bare, capture_output=True, text=True, check=True
            )
            seconds, kilobytes = done.stdout.split()
            told[way].append((float(seconds), float(kilobytes) / 1000))
    figures: dict[str, float] = {}
    for way, found in told.items():
        figures |= {
            f"{way}_s": round(min(s for s, _ in found), 2),
            f"{way}_mb": round(min(mb for _, mb in found)),
        }
    report(figures)


if __name__ == "__main__":
    main()
