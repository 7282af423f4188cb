"""Device-seconds by month, team, user or run, computed from the allocations. An open allocation
counts until now.

A run that shares a device is charged its full time, because it occupies a slot.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.db.models import Q, QuerySet
from django.utils import timezone

from training.gpus.models import Allocation

HALF_LIFE_SECONDS = 7 * 86_400.0  # usage of a week ago counts half
DECAY_CUTOFF = timedelta(days=56)  # eight half-lives: less than half a percent


@dataclass(frozen=True)
class UsageRow:
    """A row of the monthly report."""

    team: str
    user: str
    pool: str
    runs: int
    seconds: float


def get_month_bounds(moment: datetime) -> tuple[datetime, datetime]:
    """The beginning of the calendar month (UTC) of a moment, and of the next month."""
    first = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first, (first + timedelta(days=32)).replace(day=1)


def count_seconds_within(
    allocation: Allocation, begin: datetime, end: datetime, now: datetime
) -> float:
    """Seconds of an allocation inside [begin, end)."""
    until = min(allocation.released_at or now, end)
    return max(0.0, (until - max(allocation.started_at, begin)).total_seconds())


def find_overlapping(begin: datetime, end: datetime, **filters: object) -> QuerySet[Allocation]:
    """Allocations that overlap [begin, end)."""
    open_or_later = Q(released_at=None) | Q(released_at__gt=begin)
    return Allocation.objects.filter(open_or_later, started_at__lt=end, **filters).select_related(
        "team", "user", "device__pool"
    )


def build_month_report(moment: datetime, now: datetime | None = None) -> list[UsageRow]:
    """Usage in the month of `moment` by team, user and pool, the largest first."""
    begin, end = get_month_bounds(moment)
    now = now or timezone.now()
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    runs: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for one in find_overlapping(begin, end):
        key = (one.team.name if one.team else "", one.user.username, one.device.pool.name)
        seconds[key] += count_seconds_within(one, begin, end, now)
        runs[key].add(one.run_id)
    rows = [UsageRow(*key, runs=len(runs[key]), seconds=total) for key, total in seconds.items()]
    return sorted(rows, key=lambda row: (-row.seconds, row.team, row.user))


def get_seconds_this_month(
    field: str, now: datetime | None = None, **filters: object
) -> dict[int | None, float]:
    """Seconds of this month by `field`, which is `team_id` (None for no team) or `user_id`."""
    now = now or timezone.now()
    begin, end = get_month_bounds(now)
    seconds: dict[int | None, float] = defaultdict(float)
    for one in find_overlapping(begin, end, **filters):
        seconds[getattr(one, field)] += count_seconds_within(one, begin, end, now)
    return seconds


def get_run_seconds(run_id: int, now: datetime | None = None) -> float:
    """Seconds over all attempts of a run."""
    return get_seconds_by_run([run_id], now).get(run_id, 0.0)


def get_seconds_by_run(runs: Collection[int], now: datetime | None = None) -> dict[int, float]:
    """Seconds of each of these runs that has used a device."""
    now = now or timezone.now()
    seconds: dict[int, float] = defaultdict(float)
    rows = Allocation.objects.filter(run_id__in=list(runs))
    for run, started, released in rows.values_list("run_id", "started_at", "released_at"):
        seconds[run] += ((released or now) - started).total_seconds()
    return seconds


def compute_decayed_usage(now: datetime | None = None) -> dict[int, float]:
    """Recent seconds of every user: each allocation counts half for every week since its end."""
    now = now or timezone.now()
    seconds: dict[int, float] = defaultdict(float)
    rows = Allocation.objects.filter(Q(released_at=None) | Q(released_at__gt=now - DECAY_CUTOFF))
    for user, started, released in rows.values_list("user", "started_at", "released_at"):
        ended = released or now
        age = (now - ended).total_seconds()
        seconds[user] += (ended - started).total_seconds() * math.pow(0.5, age / HALF_LIFE_SECONDS)
    return seconds
