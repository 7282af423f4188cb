"""A repeated transaction leaves SQLite's lock to others for as long as it held it."""

import pytest
from django.db import connection

from training.runs.queue import lock_share
from training.runs.queue.lock_share import MAX_PAUSE_SECONDS, LockShare

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(connection.vendor != "sqlite", reason="only SQLite has such a lock"),
]


class FakeClock:
    def __init__(self):
        self.now, self.pauses = 100.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(lock_share, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("held", "between", "pause"), [(2, 0, 2), (2, 0.5, 1.5), (2, 9, 0), (60, 0, MAX_PAUSE_SECONDS)]
)
def test_the_next_transaction_waits_as_long_as_the_last_one_took(clock, held, between, pause):
    share = LockShare()
    with share.hold():
        clock.now += held
    clock.now += between
    with share.hold():
        pass
    assert clock.pauses == [0, pause]


def test_a_transaction_that_fails_counts_too(clock):
    share = LockShare()
    with pytest.raises(ValueError), share.hold():
        clock.now += 3
        raise ValueError
    with share.hold():
        pass
    assert clock.pauses == [0, 3]
