"""Kinds of jobs that tests steer, each in a lane of its own."""

import pytest

from training.jobs import kinds
from training.jobs.kinds import JobKind, Lane, register_kind
from training.jobs.runner import run_lane
from training.webhooks.models import Webhook


class SteeredKind:
    """`act` is what a job does: a function of the job that returns its result."""

    def __init__(self, name, *, size=1, **options):
        self.name = name
        self.seen = []
        self.act = lambda _job: {}
        self.lane = Lane(name, size=size)
        register_kind(JobKind(name, self._run, lane=self.lane, subjects=(Webhook,), **options))

    def _run(self, job):
        self.seen.append(job.key)
        return self.act(job)

    def run(self):
        run_lane(self.lane)


@pytest.fixture
def steer():
    """Makes kinds; the tables are as they were afterwards."""
    before = dict(kinds.KINDS), dict(kinds.LANES)
    yield SteeredKind
    for table, old in zip((kinds.KINDS, kinds.LANES), before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def kind(steer):
    return steer("test")
