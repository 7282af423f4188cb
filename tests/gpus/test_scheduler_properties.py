"""Properties of the scheduler under random submissions, ends, crashes and edits on a simulated
pool: no double booking, no exceeded limit, no starvation and no eviction loops.
"""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import count, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pool_simulator import DAY_SECONDS, SimulatedPool
from training.gpus.scheduling.state import (
    MAX_EVICTIONS_PER_DAY,
    DeviceState,
    PoolState,
    TeamQuota,
    WaitingRun,
)

GB = 10**9
TEAMS = (1, 2, 3)

submits = st.tuples(
    st.just("submit"),
    st.sampled_from(TEAMS),
    st.integers(1, 2),
    st.sampled_from((None, 4 * GB, 10 * GB, 20 * GB)),
    st.sampled_from(("normal", "normal", "background", "urgent")),
    st.integers(1, 4000),
    st.sampled_from((0.5, 1.0, 2.0, math.inf)),  # expected duration / real duration
)
waits = st.tuples(st.just("wait"), st.integers(1, 3000))
crashes = st.tuples(st.just("crash"), st.integers(0, 9))
cancels = st.tuples(st.just("cancel"), st.integers(0, 9))
edits = st.tuples(
    st.just("edit"),
    st.sampled_from(TEAMS),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 4)),
    st.booleans(),
)
event_lists = st.lists(st.one_of(submits, submits, waits, crashes, cancels, edits), max_size=60)
TEAM_QUOTAS = {team: TeamQuota(f"team {team}", guaranteed=1) for team in TEAMS}


class CheckedPool(SimulatedPool):
    """Checks the invariants after every admission pass."""

    def __init__(self, pool_state):
        self.numbers = count(1)
        super().__init__(pool_state)

    def run_admission(self):
        team_counts = defaultdict(int)
        for _, running_run in self.running.values():
            team_counts[running_run.team] += 1
        decision = super().run_admission()
        for start in decision.starts:
            quota = self.state.quota_for(start.team)
            team_counts[start.team] += 1
            assert quota.limit is None or team_counts[start.team] <= quota.limit, (
                "a limit was exceeded by an admission"
            )
            assert not quota.is_on_hold
        for victim in decision.evictions:
            simulated_run, running_run = self.running[victim]
            assert self.now - running_run.started >= self.state.min_run_seconds
            assert (
                sum(at > self.now - DAY_SECONDS for at in simulated_run.evicted_at)
                <= MAX_EVICTIONS_PER_DAY
            )
        self.check_devices()
        return decision

    def check_devices(self):
        runs_on = defaultdict(list)
        for _, running_run in self.running.values():
            runs_on[running_run.device_id].append(running_run)
        for device_id, current_runs in runs_on.items():
            assert len(current_runs) <= self.state.runs_per_device
            assert len(current_runs) == 1 or all(
                running_run.memory is not None for running_run in current_runs
            )
            assert (
                sum(running_run.memory or 0 for running_run in current_runs)
                <= self.devices[device_id].total_bytes
            )


def run_step(pool, work, step):
    kind, *values = step
    if kind == "submit":
        team, user, memory, priority, seconds, guess = values
        run = next(pool.numbers)
        work[run] = seconds
        pool.submit_run(
            WaitingRun(run, team, 10 * team + user, 0.0, memory, priority, seconds * guess), seconds
        )
    elif kind == "wait":
        pool.run_until(pool.now + values[0])
    elif kind == "crash" and pool.running:
        pool.end_run(sorted(pool.running)[values[0] % len(pool.running)], has_crashed=True)
    elif kind == "cancel" and pool.waiting:
        run = sorted(pool.waiting)[values[0] % len(pool.waiting)]
        pool.cancel_run(run)
        work.pop(run)
    elif kind == "edit":
        team, guaranteed, limit, is_on_hold = values
        quota = replace(
            pool.state.quota_for(team), guaranteed=guaranteed, limit=limit, is_on_hold=is_on_hold
        )
        before = set(pool.running)
        pool.state = replace(pool.state, teams={**pool.state.teams, team: quota})
        pool.run_admission()
        assert before <= set(pool.running)  # an edit stops no running run


@settings(max_examples=120, deadline=None)
@given(event_lists, st.integers(1, 4), st.integers(1, 3))
def test_random_events_break_no_invariant_and_every_run_finishes(events, devices, runs_per_device):
    device_states = [DeviceState(number, 24 * GB) for number in range(devices)]
    pool = CheckedPool(
        PoolState("p", device_states, teams=dict(TEAM_QUOTAS), runs_per_device=runs_per_device)
    )
    work = {}
    for step in events:
        run_step(pool, work, step)
    # Without new runs and limits every run finishes, and the ledger adds up to the second
    pool.state = replace(pool.state, teams={})
    pool.run_admission()
    pool.run_until(pool.now + 10 * DAY_SECONDS)
    assert not pool.waiting and not pool.running
    seconds = defaultdict(float)
    for line in pool.ledger:
        seconds[line.run] += line.ended - line.started
    assert {run: round(total, 6) for run, total in seconds.items() if run in work} == work
    for device_id in pool.devices:
        lines = sorted(
            (line for line in pool.ledger if line.device == device_id),
            key=lambda line: line.started,
        )
        if runs_per_device == 1:
            assert all(one.ended <= following.started for one, following in pairwise(lines))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((4, 10)), st.integers(10, 500)), max_size=40),
    st.integers(10, 1000),
)
def test_the_first_run_starts_as_soon_as_its_device_can_be_free(small, first):
    """Small runs that share the device keep arriving. The large run starts when those that started
    before its submission have ended.
    """
    pool = SimulatedPool.create_pool(1, 24 * GB, runs_per_device=3)
    pool.submit_run(WaitingRun(1, 1, 1, 0.0, 4 * GB, "normal", float(first)), first)
    pool.submit_run(WaitingRun(2, 2, 2, 0.0, None, "normal", 10.0), 10)
    for run, (memory, seconds) in enumerate(small, start=3):
        pool.submit_run(WaitingRun(run, 3, 3, 0.0, memory * GB, "normal", float(seconds)), seconds)
        pool.run_until(pool.now + 20)
    pool.run_until(pool.now + DAY_SECONDS)
    assert next(line.started for line in pool.ledger if line.run == 2) == first
