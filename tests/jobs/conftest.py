"""A kind of job that tests steer, in a lane of its own."""

import pytest

from training.jobs import kinds
from training.jobs.kinds import JobKind, Lane, register_kind
from training.jobs.runner import run_lane
from training.webhooks.models import Webhook


class Steered:
    """What `run` does is the test's to say: a function of the job, which returns a result."""

    def __init__(self, name, *, size=1, **options):
        self.seen = []
        self.act = lambda _job: {}
        self.lane = Lane(name, size=size)
        self.kind = JobKind(name, self._run, lane=self.lane, subjects=(Webhook,), **options)
        register_kind(self.kind)

    def _run(self, job):
        self.seen.append(job.key)
        return self.act(job)

    def run(self):
        run_lane(self.lane)


@pytest.fixture
def steered():
    before, lanes = dict(kinds.KINDS), dict(kinds.LANES)
    yield Steered
    for table, old in ((kinds.KINDS, before), (kinds.LANES, lanes)):
        table.clear()
        table.update(old)


@pytest.fixture
def kind(steered):
    return steered("test")
