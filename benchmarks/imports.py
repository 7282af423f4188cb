"""Measure the cost of the engine's imports, with and without `fast_imports`.

The figures are CPU seconds (user and system) and peak memory of a new process; the minimum of
several alternating rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report

ROOT = Path(__file__).parent.parent
ROUNDS = 5
VARIANTS = {
    "plain": "import training.engine.train.attempt",
    "quick": "from training.engine.fast_imports import fast_imports\nwith fast_imports():\n    "
    "import training.engine.train.attempt",
}
PRINT_USAGE = (
    "\nimport resource\nused = resource.getrusage(resource.RUSAGE_SELF)\nprint(used.ru_utime + "
    "used.ru_stime, used.ru_maxrss)"
)


def main() -> None:
    samples: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCH")
    }
    for _ in range(ROUNDS):
        for variant, code in VARIANTS.items():
            command = [sys.executable, "-W", "ignore", "-c", code + PRINT_USAGE]
            process = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            seconds, kilobytes = process.stdout.split()
            samples[variant].append((float(seconds), float(kilobytes) / 1000))
    figures: dict[str, float] = {}
    for variant, values in samples.items():
        figures |= {
            f"{variant}_s": round(min(s for s, _ in values), 2),
            f"{variant}_mb": round(min(mb for _, mb in values)),
        }
    print_report(figures)


if __name__ == "__main__":
    main()
