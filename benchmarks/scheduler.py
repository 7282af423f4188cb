"""One admission pass over 512 devices, and when every waiting run should start; and how both grow
from 100 to 10,000 of them.

The true scheduler on a scene in memory: what the database adds is not in it. Half the runs share
devices with others.
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

from benchmarks import report
from training.gpus.scheduling.eta import estimate_start_ranges
from training.gpus.scheduling.explain import explain_queue
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import DeviceState, PendingJob, PoolState, RunningJob, TeamQuota

DEVICES, TEAMS, USERS = 512, 50, 200
GB = 10**9
NOW = 10_000.0
REPEATS = 3


def make_pool_state(waiting: int) -> PoolState:
    """All devices but eight in use, as after a pass in a busy week."""
    rng = random.Random(waiting)
    devices = [DeviceState(number, 80 * GB) for number in range(DEVICES)]
    running = [
        RunningJob(
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
    pending = [
        PendingJob(
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
    return PoolState("pool", devices, running, pending, teams, runs_per_device=2, now=NOW)


PRIORITIES = ("normal", "normal", "normal", "background")


def draw_seconds(rng: random.Random) -> float:
    return rng.uniform(600, 4 * 3600)


def measure_fastest(action: Callable[[], object]) -> float:
    """Milliseconds of the best of a few times."""
    best = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def run_pass(state: PoolState) -> None:
    scheduler = Scheduler(state)
    explain_queue(scheduler, scheduler.admit_jobs(NOW).block_reasons)


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
    # The exponent of the growth over the last tenfold: 1 is linear.
    figures["growth"] = round(math.log10(figures["pass_ms_10000"] / figures["pass_ms_1000"]), 2)
    figures["eta_growth"] = round(math.log10(figures["eta_ms_10000"] / figures["eta_ms_1000"]), 2)
    report(figures)


if __name__ == "__main__":
    main()
