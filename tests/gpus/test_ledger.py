"""Device-seconds computed from allocations: exact to the second, split at the end of the month, and
counted by budgets.
"""

from datetime import UTC, datetime, timedelta

import pytest

from training.gpus import ledger, usage
from training.gpus.devices import DeviceReading, update_devices
from training.gpus.models import Allocation, Device, Quota
from training.gpus.scheduling.load_state import load_pool_state
from training.people.models import Team

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 11, 16, 12, tzinfo=UTC)


@pytest.fixture
def make_allocation(alice):
    update_devices([DeviceReading(0, "GPU-0", "A100", "A100", 80 * 10**9, 0)])
    device = Device.objects.get()

    def create(run, started, ended, user=alice, team=None):
        return Allocation.objects.create(
            device=device,
            slot=0,
            run_id=run,
            run_name=f"run {run}",
            user=user,
            team=team,
            priority="normal",
            started_at=started,
            released_at=ended,
        )

    return create


def test_an_allocation_is_split_at_the_end_of_the_month(make_allocation):
    edge = datetime(2026, 11, 1, tzinfo=UTC)
    make_allocation(1, edge - timedelta(hours=3), edge + timedelta(hours=2))
    [october] = ledger.build_month_report(edge - timedelta(days=1), NOW)
    [november] = ledger.build_month_report(edge, NOW)
    assert (october.seconds, november.seconds) == (3 * 3600, 2 * 3600)


def test_an_open_allocation_counts_until_now_and_a_closed_one_to_the_second(
    make_allocation, people
):
    voice = Team.objects.get(name="voice")
    make_allocation(1, NOW - timedelta(seconds=90), NOW - timedelta(seconds=50), team=voice)
    make_allocation(2, NOW - timedelta(seconds=10), None, team=voice)
    [line] = ledger.build_month_report(NOW, NOW)
    assert (line.team, line.user, line.pool, line.runs, line.seconds) == (
        "voice",
        "alice",
        "A100",
        2,
        50,
    )


def test_the_monthly_reports_add_up_to_the_allocations(make_allocation, people):
    """Each month is compared with a count in steps of at most an hour."""
    begin = datetime(2026, 8, 30, 23, 59, tzinfo=UTC)
    at, expected = begin, {}
    for number in range(40):
        until = at + timedelta(hours=31 * (number % 5), seconds=number)
        make_allocation(number, at, until)
        second = at
        while second < until:
            key = (second.year, second.month)
            expected[key] = expected.get(key, 0) + min(
                3600, (until - second).total_seconds(), until_next_hour(second)
            )
            second += timedelta(seconds=min(3600, until_next_hour(second)))
        at = until + timedelta(hours=1)
    for year, month in {*expected}:
        lines = ledger.build_month_report(datetime(year, month, 3, tzinfo=UTC), at)
        assert sum(line.seconds for line in lines) == pytest.approx(expected[year, month])


def until_next_hour(moment):
    return 3600 - moment.minute * 60 - moment.second - moment.microsecond / 1e6


def test_usage_of_last_week_counts_half(make_allocation, alice):
    make_allocation(1, NOW - timedelta(days=7, seconds=100), NOW - timedelta(days=7))
    make_allocation(2, NOW - timedelta(seconds=100), NOW)
    assert ledger.compute_decayed_usage(NOW)[alice.pk] == pytest.approx(150)


def test_a_monthly_budget_does_not_decay_and_limits_only_if_it_is_hard(make_allocation, people):
    voice = Team.objects.get(name="voice")
    make_allocation(
        1, datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 1, 9, tzinfo=UTC), team=voice
    )
    pool = Device.objects.get().pool
    quota = Quota.objects.create(pool=pool, team=voice, hours_per_month=10, is_hard_budget=False)
    assert load_pool_state(pool, NOW, [], {}).quota_for(voice.pk).seconds_left is None
    quota.is_hard_budget = True
    quota.save()
    assert load_pool_state(pool, NOW, [], {}).quota_for(voice.pk).seconds_left == 3600
    assert (
        usage.build_monthly_hours(9 * 3600, 10, True, NOW).is_near_budget
        and not usage.build_monthly_hours(7 * 3600, 10, True, NOW).is_near_budget
    )
