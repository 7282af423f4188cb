"""A repeated transaction leaves SQLite's lock to others for as long as it held it."""

import pytest
from django.db import connection

from training.runs.queue import write_throttle
from training.runs.queue.write_throttle import MAX_PAUSE_SECONDS, WriteThrottle

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
    monkeypatch.setattr(write_throttle, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("held", "between", "pause"), [(2, 0, 2), (2, 0.5, 1.5), (2, 9, 0), (60, 0, MAX_PAUSE_SECONDS)]
)
def test_the_next_transaction_waits_as_long_as_the_last_one_took(clock, held, between, pause):
    throttle = WriteThrottle()
    with throttle.atomic():
        clock.now += held
    clock.now += between
    with throttle.atomic():
        pass
    assert clock.pauses == [0, pause]


def test_a_transaction_that_fails_counts_too(clock):
    throttle = WriteThrottle()
    with pytest.raises(ValueError), throttle.atomic():
        clock.now += 3
        raise ValueError
    with throttle.atomic():
        pass
    assert clock.pauses == [0, 3]
