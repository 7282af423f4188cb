"""Measure the CPU use of an idle instance: the share of one core that web, worker and inference
need without requests.

    python benchmarks/idle.py [--seconds 120] [--json]

A new instance with a tiny model and data is started like `manage.py up` starts it, and measured
once it is quiet. Each figure includes the process and all its descendants.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report
from tests import tiny
from tests.running_site import RunningSite

PROGRAMS = ("web", "worker", "inference")
QUIET_PERCENT = 10.0  # Of one core, all three together
QUIET_WINDOW_SECONDS = 20.0
QUIET_WINDOWS = 2
MAX_WAIT_SECONDS = 900.0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants, including those that have ended."""
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure_cpu(stage: RunningSite, seconds: float) -> dict[str, float]:
    """Percent of one core that each program uses over `seconds` seconds."""
    pids = {name: stage.find_pid(name) for name in PROGRAMS}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    start = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start
    return {
        f"{name}_percent": round(100 * (cpu_seconds(pid) - before[name]) / elapsed, 2)
        for name, pid in pids.items()
    }


def wait_until_quiet(stage: RunningSite) -> None:
    """Wait for the memory forecasts of the new model, which take minutes."""
    end = time.monotonic() + MAX_WAIT_SECONDS
    quiet_windows = 0
    while quiet_windows < QUIET_WINDOWS:
        if time.monotonic() > end:
            raise SystemExit(f"The instance was not idle after {MAX_WAIT_SECONDS:.0f} s.")
        is_busy = sum(measure_cpu(stage, QUIET_WINDOW_SECONDS).values()) >= QUIET_PERCENT
        quiet_windows = 0 if is_busy else quiet_windows + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--json", action="store_true")  # Read by `print_report`
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="snapml-idle-") as folder:
        home = Path(folder)
        model = tiny.make_model(home / "model")
        with RunningSite(home / "var", model) as stage:
            wait_until_quiet(stage)
            figures = measure_cpu(stage, options.seconds)
    print_report(figures)


if __name__ == "__main__":
    main()
