"""Job kinds that tests control, each in its own lane."""

import pytest

from training.jobs import kinds
from training.jobs.kinds import JobKind, Lane, register_kind
from training.jobs.runner import run_lane
from training.webhooks.models import Webhook


class FakeKind:
    """A job kind whose jobs call `handler`, a function from the job to its result."""

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
    """Creates kinds. Afterwards the registry is restored."""
    before = dict(kinds.KINDS), dict(kinds.LANES)
    yield FakeKind
    for table, old in zip((kinds.KINDS, kinds.LANES), before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def kind(make_kind):
    return make_kind("test")
