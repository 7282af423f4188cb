"""Whatever comes, ends, crashes and is edited on a simulated pool: no device twice, no limit
exceeded, nobody starved or chased.
"""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import count, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pool_simulator import DAY_SECONDS, SimulatedPool
from training.gpus.scheduling.state import MOST_EVICTIONS, Card, Request, Scene, Share

GB = 10**9
TEAMS = (1, 2, 3)

submits = st.tuples(
    st.just("submit"),
    st.sampled_from(TEAMS),
    st.integers(1, 2),
    st.sampled_from((None, 4 * GB, 10 * GB, 20 * GB)),
    st.sampled_from(("normal", "normal", "background", "urgent")),
    st.integers(1, 4000),
    st.sampled_from((0.5, 1.0, 2.0, math.inf)),  # expected against true duration
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
stories = st.lists(st.one_of(submits, submits, waits, crashes, cancels, edits), max_size=60)
SHARES = {team: Share(f"team {team}", guaranteed=1) for team in TEAMS}


class Watched(SimulatedPool):
    """Looks at every admission while it happens."""

    def __init__(self, scene):
        self.numbers = count(1)
        super().__init__(scene)

    def run_admission(self):
        held = defaultdict(int)
        for _, holding in self.running.values():
            held[holding.team] += 1
        made = super().run_admission()
        for start in made.starts:
            share = self.state.share(start.team)
            held[start.team] += 1
            assert share.limit is None or held[start.team] <= share.limit, (
                "a limit was exceeded by an admission"
            )
            assert not share.held
        for victim in made.evictions:
            job, holding = self.running[victim]
            assert self.now - holding.started >= self.state.shortest
            assert sum(at > self.now - DAY_SECONDS for at in job.evicted_at) <= MOST_EVICTIONS
        self.check_devices()
        return made

    def check_devices(self):
        on = defaultdict(list)
        for _, holding in self.running.values():
            on[holding.card].append(holding)
        for card, there in on.items():
            assert len(there) <= self.state.most_a_card
            assert len(there) == 1 or all(holding.memory is not None for holding in there)
            assert sum(holding.memory or 0 for holding in there) <= self.devices[card].memory


def act(pool, work, step):
    kind, *values = step
    if kind == "submit":
        team, user, memory, priority, seconds, guess = values
        run = next(pool.numbers)
        work[run] = seconds
        pool.submit_run(
            Request(run, team, 10 * team + user, 0.0, memory, priority, seconds * guess), seconds
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
        team, guaranteed, limit, held = values
        share = replace(pool.state.share(team), guaranteed=guaranteed, limit=limit, held=held)
        before = set(pool.running)
        pool.state = replace(pool.state, teams={**pool.state.teams, team: share})
        pool.run_admission()
        assert before <= set(pool.running)  # an edit kills nothing


@settings(max_examples=120, deadline=None)
@given(stories, st.integers(1, 4), st.integers(1, 3))
def test_every_story_ends_well(story, devices, most_a_card):
    cards = [Card(number, 24 * GB) for number in range(devices)]
    pool = Watched(Scene("p", cards, teams=dict(SHARES), most_a_card=most_a_card))
    work = {}
    for step in story:
        act(pool, work, step)
    # Nothing new comes and every limit is lifted: everybody gets their turn, and the ledger adds up
    # to the second.
    pool.state = replace(pool.state, teams={})
    pool.run_admission()
    pool.run_until(pool.now + 10 * DAY_SECONDS)
    assert not pool.waiting and not pool.running
    seconds = defaultdict(float)
    for line in pool.ledger:
        seconds[line.run] += line.ended - line.started
    assert {run: round(total, 6) for run, total in seconds.items() if run in work} == work
    for card in pool.devices:
        lines = sorted(
            (line for line in pool.ledger if line.device == card), key=lambda line: line.started
        )
        if most_a_card == 1:
            assert all(one.ended <= following.started for one, following in pairwise(lines))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((4, 10)), st.integers(10, 500)), max_size=40),
    st.integers(10, 1000),
)
def test_the_head_starts_as_soon_as_its_device_could_be_free(small, first):
    """Small runs that share keep coming; the large one that came first starts when what ran before
    it has ended.
    """
    pool = SimulatedPool.create_pool(1, 24 * GB, most_a_card=3)
    pool.submit_run(Request(1, 1, 1, 0.0, 4 * GB, "normal", float(first)), first)
    pool.submit_run(Request(2, 2, 2, 0.0, None, "normal", 10.0), 10)
    for run, (memory, seconds) in enumerate(small, start=3):
        pool.submit_run(Request(run, 3, 3, 0.0, memory * GB, "normal", float(seconds)), seconds)
        pool.run_until(pool.now + 20)
    pool.run_until(pool.now + DAY_SECONDS)
    assert next(line.started for line in pool.ledger if line.run == 2) == first
