"""Device-seconds come from the intervals alone, to the second, split at the month's edge; budgets
count them.
"""

from datetime import UTC, datetime, timedelta

import pytest

from training.gpus import ledger, usage
from training.gpus.devices import Reading, report
from training.gpus.models import Allocation, Device, Quota
from training.gpus.scheduling.load_state import scene_of
from training.people.models import Team

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 11, 16, 12, tzinfo=UTC)


@pytest.fixture
def held(alice):
    report([Reading(0, "GPU-0", "A100", "A100", 80 * 10**9, 0)])
    device = Device.objects.get()

    def make(run, started, ended, user=alice, team=None):
        return Allocation.objects.create(
            device=device,
            place=0,
            run_id=run,
            run_name=f"run {run}",
            user=user,
            team=team,
            priority="normal",
            started_at=started,
            released_at=ended,
        )

    return make


def test_the_month_is_split_at_its_edge(held):
    edge = datetime(2026, 11, 1, tzinfo=UTC)
    held(1, edge - timedelta(hours=3), edge + timedelta(hours=2))
    [october] = ledger.month_report(edge - timedelta(days=1), NOW)
    [november] = ledger.month_report(edge, NOW)
    assert (october.seconds, november.seconds) == (3 * 3600, 2 * 3600)


def test_an_open_interval_counts_until_now_and_a_closed_one_to_the_second(held, people):
    voice = Team.objects.get(name="voice")
    held(1, NOW - timedelta(seconds=90), NOW - timedelta(seconds=50), team=voice)
    held(2, NOW - timedelta(seconds=10), None, team=voice)
    [line] = ledger.month_report(NOW, NOW)
    assert (line.team, line.user, line.pool, line.runs, line.seconds) == (
        "voice",
        "alice",
        "A100",
        2,
        50,
    )


def test_the_report_can_be_recomputed_from_the_intervals_alone(held, people):
    """Month by month, against a count of every single second."""
    begin = datetime(2026, 8, 30, 23, 59, tzinfo=UTC)
    at, expected = begin, {}
    for number in range(40):
        until = at + timedelta(hours=31 * (number % 5), seconds=number)
        held(number, at, until)
        second = at
        while second < until:
            key = (second.year, second.month)
            expected[key] = expected.get(key, 0) + min(
                3600, (until - second).total_seconds(), until_next_hour(second)
            )
            second += timedelta(seconds=min(3600, until_next_hour(second)))
        at = until + timedelta(hours=1)
    for year, month in {*expected}:
        lines = ledger.month_report(datetime(year, month, 3, tzinfo=UTC), at)
        assert sum(line.seconds for line in lines) == pytest.approx(expected[year, month])


def until_next_hour(moment):
    return 3600 - moment.minute * 60 - moment.second - moment.microsecond / 1e6


def test_use_of_last_week_counts_half(held, alice):
    held(1, NOW - timedelta(days=7, seconds=100), NOW - timedelta(days=7))
    held(2, NOW - timedelta(seconds=100), NOW)
    assert ledger.used_of_late(NOW)[alice.pk] == pytest.approx(150)


def test_a_monthly_budget_does_not_decay_and_ends_only_where_it_is_hard(held, people):
    voice = Team.objects.get(name="voice")
    held(1, datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 1, 9, tzinfo=UTC), team=voice)
    pool = Device.objects.get().pool
    quota = Quota.objects.create(pool=pool, team=voice, hours_a_month=10, hard=False)
    assert scene_of(pool, NOW, [], {}).share(voice.pk).seconds_left is None
    quota.hard = True
    quota.save()
    assert scene_of(pool, NOW, [], {}).share(voice.pk).seconds_left == 3600
    assert (
        usage.hours(9 * 3600, 10, True, NOW).warning
        and not usage.hours(7 * 3600, 10, True, NOW).warning
    )
