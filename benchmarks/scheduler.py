"""Measure an admission pass and the start estimates of all waiting runs on 512 devices, with 100 to
10,000 waiting runs.

The real scheduler runs on a pool state in memory, so database access is not included. Half of the
runs share devices with others.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report
from training.gpus.scheduling.eta import estimate_start_ranges
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import DeviceState, PoolState, RunningRun, TeamQuota, WaitingRun
from training.gpus.scheduling.wait_messages import explain_queue

DEVICES, TEAMS, USERS = 512, 50, 200
GB = 10**9
NOW = 10_000.0
REPEATS = 3


def make_pool_state(waiting: int) -> PoolState:
    """A busy pool: all devices but eight are in use."""
    rng = random.Random(waiting)
    devices = [DeviceState(number, 80 * GB) for number in range(DEVICES)]
    running = [
        RunningRun(
            10**6 + n,
            n,
            rng.randrange(TEAMS) + 1,
            rng.randrange(USERS),
            rng.uniform(0, NOW),
            40 * GB,
            expected_end=NOW + draw_seconds(rng),
        )
        for n in range(DEVICES - 8)
    ]
    waiting_runs = [
        WaitingRun(
            run,
            user % TEAMS + 1,
            user,
            float(run),
            rng.choice((30, 40, 70)) * GB,
            rng.choice(PRIORITIES),
            draw_seconds(rng),
        )
        for run in range(1, waiting + 1)
        for user in [rng.randrange(USERS)]
    ]
    teams = {
        team: TeamQuota(f"team {team}", guaranteed=8, limit=40) for team in range(1, TEAMS + 1)
    }
    return PoolState("pool", devices, running, waiting_runs, teams, runs_per_device=2, now=NOW)


PRIORITIES = ("normal", "normal", "normal", "background")


def draw_seconds(rng: random.Random) -> float:
    return rng.uniform(600, 4 * 3600)


def measure_fastest(action: Callable[[], object]) -> float:
    """Milliseconds of the fastest of REPEATS calls."""
    best = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def run_pass(state: PoolState) -> None:
    scheduler = Scheduler(state)
    explain_queue(scheduler, scheduler.admit_runs(NOW).block_reasons)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    figures: dict[str, float] = {}
    for waiting in (100, 1_000, 10_000):
        state = make_pool_state(waiting)
        pass_ms = measure_fastest(partial(run_pass, state))
        eta_ms = measure_fastest(partial(estimate_start_ranges, state, NOW))
        figures[f"pass_ms_{waiting}"] = round(pass_ms, 1)
        figures[f"eta_ms_{waiting}"] = round(eta_ms, 1)
    # Exponent of the growth from 1,000 to 10,000 runs; 1 is linear
    figures["growth"] = round(math.log10(figures["pass_ms_10000"] / figures["pass_ms_1000"]), 2)
    figures["eta_growth"] = round(math.log10(figures["eta_ms_10000"] / figures["eta_ms_1000"]), 2)
    print_report(figures)


if __name__ == "__main__":
    main()
