"""What teams and people have, hold and have used: the numbers of the quota pages and of the API.
Reads only.
"""

from __future__ import annotations

import calendar
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.utils import timezone

from training.errors import UserError
from training.gpus import ledger
from training.gpus.models import Allocation, Device, PersonalQuota, Pool, Quota
from training.people.models import Role, Team, User

WARN_SHARE = 0.8
IDLE_AFTER = timedelta(minutes=15)


@dataclass(frozen=True)
class Hours:
    """Device-hours of a month against the budget, if there is one."""

    used: float
    budget: float | None
    at_this_pace: float  # by the month's end
    hard: bool = False

    @property
    def share(self) -> float | None:
        return self.used / self.budget if self.budget else None

    @property
    def warning(self) -> bool:
        return self.share is not None and self.share >= WARN_SHARE


@dataclass(frozen=True)
class TeamLine:
    team: Team | None
    quota: Quota
    holds: int
    hours: Hours

    @property
    def borrowed(self) -> int:
        return max(0, self.holds - self.quota.guaranteed)


@dataclass(frozen=True)
class PersonLine:
    user: User
    quota: PersonalQuota
    holds: int
    hours: Hours


def teams_seen(user: User) -> set[int] | None:
    """The teams whose use of devices a person may look into: those that they lead. None: all
    (admins).
    """
    if user.is_superuser:
        return None
    return set(user.memberships.filter(role=Role.LEAD).values_list("team_id", flat=True))


def looks_into_quotas(user: User) -> bool:
    """Admins, and leads of any team."""
    seen = teams_seen(user)
    return seen is None or bool(seen)


def team_lines(user: User, pool: Pool) -> list[TeamLine]:
    """A line for each team (and one for nobody's team) that the person may look into."""
    now = timezone.now()
    seen = teams_seen(user)
    quotas = {
        quota.team_id: quota
        for quota in Quota.objects.filter(pool=pool).select_related("team", "pool")
    }
    allocations = Allocation.objects.filter(device__pool=pool, released_at=None)
    held: Counter[int | None] = Counter(allocations.values_list("team_id", flat=True))
    used = ledger.used_this_month("team_id", now, device__pool=pool)
    teams: list[Team | None] = list(
        Team.objects.order_by("name")
        if seen is None
        else Team.objects.filter(pk__in=seen).order_by("name")
    )
    if seen is None:
        teams.append(None)
    lines = []
    for team in teams:
        key = team.pk if team else None
        quota = quotas.get(key) or Quota(pool=pool, team=team)
        lines.append(
            TeamLine(
                team,
                quota,
                held[key],
                hours(used.get(key, 0.0), quota.hours_a_month, quota.hard, now),
            )
        )
    return lines


def person_lines() -> list[PersonLine]:
    """Everybody who may sign in, with what they hold over all pools."""
    now = timezone.now()
    quotas = {quota.user_id: quota for quota in PersonalQuota.objects.all()}
    held = Counter(Allocation.objects.filter(released_at=None).values_list("user", flat=True))
    used = ledger.used_this_month("user_id", now)
    lines = []
    for user in User.objects.filter(is_active=True).order_by("username"):
        quota = quotas.get(user.pk) or PersonalQuota(user=user)
        lines.append(
            PersonLine(
                user,
                quota,
                held[user.pk],
                hours(used.get(user.pk, 0.0), quota.hours_a_month, quota.hard, now),
            )
        )
    return lines


def hours(seconds: float, budget: float | None, hard: bool, now: datetime) -> Hours:
    begin, end = ledger.month_of(now)
    passed = max(3600.0, (now - begin).total_seconds())
    used = seconds / 3600
    return Hours(used, budget, used * (end - begin).total_seconds() / passed, hard)


def own_hours(user: User) -> Hours | None:
    """A person's month against their budget, for the strip at the top of every page; None without a
    budget.
    """
    now = timezone.now()
    quota = PersonalQuota.objects.filter(user=user).exclude(hours_a_month=None).first()
    if quota is None:
        return None
    used = ledger.used_this_month("user_id", now, user=user).get(user.pk, 0.0)
    return hours(used, quota.hours_a_month, quota.hard, now)


def burn_down(pool: Pool, team: Team | None) -> list[tuple[str, float]]:
    """Device-hours that a team has used by the end of each day of this month, up to now."""
    now = timezone.now()
    begin, end = ledger.month_of(now)
    intervals = list(ledger.touching(begin, end, device__pool=pool, team=team))
    days = calendar.monthrange(begin.year, begin.month)[1]
    found = []
    for day in range(days):
        until = begin + timedelta(days=day + 1)
        seconds = sum(ledger.within(one, begin, min(until, now), now) for one in intervals)
        found.append((f"{begin + timedelta(days=day):%Y-%m-%d}", round(seconds / 3600, 3)))
        if until >= now:
            break
    return found


def idle_but_held(device: Device) -> bool:
    """A run has it, and it has done next to nothing for a quarter of an hour."""
    return bool(device.busy_at and timezone.now() - device.busy_at > IDLE_AFTER)


def month_named(text: str) -> datetime:
    """`2026-11` as a moment in that month; this month for nothing.

    Raises:
        UserError: it is no month.
    """
    if not text:
        return timezone.now()
    try:
        if not "2000" <= text < "3000":
            raise ValueError(text)
        return datetime.strptime(text + "-02 +0000", "%Y-%m-%d %z")
    except ValueError as error:
        raise UserError("A month is written as 2026-11.", field="month") from error


def report_lines(user: User, moment: datetime) -> list[ledger.Line]:
    """The month's report: all of it for admins, their teams' part for leads."""
    seen = teams_seen(user)
    if seen is None:
        return ledger.month_report(moment)
    names = set(Team.objects.filter(pk__in=seen).values_list("name", flat=True))
    return [line for line in ledger.month_report(moment) if line.team in names]


def intervals(user: User, begin: datetime) -> dict[int, list[Allocation]]:
    """Who held what since `begin`, by device: all for admins, their teams' and their own for
    others.
    """
    seen = teams_seen(user)
    found: dict[int, list[Allocation]] = defaultdict(list)
    for one in ledger.touching(begin, timezone.now() + timedelta(seconds=1)):
        if seen is None or one.team_id in seen or one.user_id == user.pk:
            found[one.device_id].append(one)
    return found
