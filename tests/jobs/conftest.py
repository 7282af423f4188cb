"""Kinds of jobs that tests steer, each in a lane of its own."""

import pytest

from training.jobs import kinds
from training.jobs.kinds import JobKind, Lane, register_kind
from training.jobs.runner import run_lane
from training.webhooks.models import Webhook


class FakeKind:
    """`act` is what a job does: a function of the job that returns its result."""

    def __init__(self, name, *, size=1, **options):
        self.name = name
        self.handled_keys = []
        self.handler = lambda _job: {}
        self.lane = Lane(name, size=size)
        register_kind(
            JobKind(name, self._handle_job, lane=self.lane, subjects=(Webhook,), **options)
        )

    def _handle_job(self, job):
        self.handled_keys.append(job.key)
        return self.handler(job)

    def run_jobs(self):
        run_lane(self.lane)


@pytest.fixture
def make_kind():
    """Makes kinds; the tables are as they were afterwards."""
    before = dict(kinds.KINDS), dict(kinds.LANES)
    yield FakeKind
    for table, old in zip((kinds.KINDS, kinds.LANES), before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def kind(make_kind):
    return make_kind("test")
