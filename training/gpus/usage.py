"""Quotas, devices in use and device-hours of teams and users, for the quota pages and the API.
Read-only.
"""

from __future__ import annotations

import calendar
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Q, QuerySet
from django.utils import timezone

from training.errors import UserError
from training.gpus import ledger
from training.gpus.models import Allocation, Device, PersonalQuota, Pool, Quota
from training.people.models import Role, Team, User

BUDGET_WARNING_FRACTION = 0.8
IDLE_AFTER = timedelta(minutes=15)


@dataclass(frozen=True)
class MonthlyHours:
    """Device-hours of a month against the budget, if there is one."""

    used: float
    budget: float | None
    projected: float  # at the end of the month, at the current rate
    is_hard_budget: bool = False

    @property
    def budget_fraction(self) -> float | None:
        return self.used / self.budget if self.budget else None

    @property
    def is_near_budget(self) -> bool:
        return self.budget_fraction is not None and self.budget_fraction >= BUDGET_WARNING_FRACTION


@dataclass(frozen=True)
class TeamUsage:
    """A team's row on the quota page of a pool. `team` is None for the users without a team."""

    team: Team | None
    quota: Quota
    device_count: int
    hours: MonthlyHours

    @property
    def borrowed(self) -> int:
        """Devices in use beyond the guarantee."""
        return max(0, self.device_count - self.quota.guaranteed)


@dataclass(frozen=True)
class PersonUsage:
    """A user's row on the quota page."""

    user: User
    quota: PersonalQuota
    device_count: int
    hours: MonthlyHours


def get_visible_team_ids(user: User) -> set[int] | None:
    """The ids of the teams whose usage a user may see: those that they lead, or None for all teams
    (admins).
    """
    if user.is_superuser:
        return None
    return set(user.memberships.filter(role=Role.LEAD).values_list("team_id", flat=True))


def can_view_quotas(user: User) -> bool:
    """Admins and team leads can."""
    visible_ids = get_visible_team_ids(user)
    return visible_ids is None or bool(visible_ids)


def list_quota_teams(user: User) -> list[Team | None]:
    """The teams whose usage a user may see. For admins, None stands for the users without a
    team.
    """
    visible_ids = get_visible_team_ids(user)
    teams = Team.objects.order_by("name")
    return [*teams, None] if visible_ids is None else list(teams.filter(pk__in=visible_ids))


def get_team_usage(pool: Pool, team: Team | None) -> TeamUsage:
    return list_team_usage([(pool, team)])[0]


def list_team_usage(pairs: Sequence[tuple[Pool, Team | None]]) -> list[TeamUsage]:
    """A row for each pair, with four queries for any number of them."""
    now = timezone.now()
    pools = {pool.pk for pool, _ in pairs}
    quotas = {
        (quota.pool_id, quota.team_id): quota for quota in Quota.objects.filter(pool__in=pools)
    }
    open_allocations = Allocation.objects.filter(device__pool__in=pools, released_at=None)
    device_counts: Counter[tuple[int, int | None]] = Counter(
        open_allocations.values_list("device__pool", "team")
    )
    used: dict[tuple[int, int | None], float] = defaultdict(float)
    begin, end = ledger.get_month_bounds(now)
    for one in ledger.find_overlapping(begin, end, device__pool__in=pools):
        seconds = ledger.count_seconds_within(one, begin, end, now)
        used[one.device.pool_id, one.team_id] += seconds
    rows = []
    for pool, team in pairs:
        key = (pool.pk, team.pk if team else None)
        quota = quotas.get(key) or Quota()
        quota.pool, quota.team = pool, team
        hours = build_monthly_hours(used[key], quota.hours_per_month, quota.is_hard_budget, now)
        rows.append(TeamUsage(team, quota, device_counts[key], hours))
    return rows


def list_person_usage(users: Sequence[User]) -> list[PersonUsage]:
    """A row for each user, with their devices over all pools."""
    now = timezone.now()
    quotas = {quota.user_id: quota for quota in PersonalQuota.objects.filter(user__in=users)}
    open_allocations = Allocation.objects.filter(released_at=None, user__in=users)
    device_counts = Counter(open_allocations.values_list("user", flat=True))
    used = ledger.get_seconds_this_month("user_id", now, user__in=users)
    rows = []
    for user in users:
        quota = quotas.get(user.pk) or PersonalQuota(user=user)
        rows.append(
            PersonUsage(
                user,
                quota,
                device_counts[user.pk],
                build_monthly_hours(
                    used.get(user.pk, 0.0), quota.hours_per_month, quota.is_hard_budget, now
                ),
            )
        )
    return rows


def build_monthly_hours(
    seconds: float, budget: float | None, is_hard_budget: bool, now: datetime
) -> MonthlyHours:
    begin, end = ledger.get_month_bounds(now)
    elapsed = max(3600.0, (now - begin).total_seconds())
    used = seconds / 3600
    return MonthlyHours(
        used, budget, used * (end - begin).total_seconds() / elapsed, is_hard_budget
    )


def get_own_hours(user: User) -> MonthlyHours | None:
    """A user's hours of this month for the status bar, or None if they have no budget."""
    now = timezone.now()
    quota = PersonalQuota.objects.filter(user=user).exclude(hours_per_month=None).first()
    if quota is None:
        return None
    used = ledger.get_seconds_this_month("user_id", now, user=user).get(user.pk, 0.0)
    return build_monthly_hours(used, quota.hours_per_month, quota.is_hard_budget, now)


def compute_burn_down(pool: Pool, team: Team | None) -> list[tuple[str, float]]:
    """Device-hours that a team has used by the end of each day of this month, up to now."""
    now = timezone.now()
    begin, end = ledger.get_month_bounds(now)
    intervals = list(ledger.find_overlapping(begin, end, device__pool=pool, team=team))
    days = calendar.monthrange(begin.year, begin.month)[1]
    points = []
    for day in range(days):
        until = begin + timedelta(days=day + 1)
        seconds = sum(
            ledger.count_seconds_within(one, begin, min(until, now), now) for one in intervals
        )
        points.append((f"{begin + timedelta(days=day):%Y-%m-%d}", round(seconds / 3600, 3)))
        if until >= now:
            break
    return points


def is_idle_in_use(device: Device) -> bool:
    """Whether a device that a run occupies has been idle for a quarter of an hour."""
    return bool(device.last_busy_at and timezone.now() - device.last_busy_at > IDLE_AFTER)


def parse_month(text: str) -> datetime:
    """A moment in the month such as `2026-11`, or now if the text is empty.

    Raises:
        UserError: the text is not a month.
    """
    if not text:
        return timezone.now()
    try:
        if not "2000" <= text < "3000":
            raise ValueError(text)
        return datetime.strptime(text + "-02 +0000", "%Y-%m-%d %z")
    except ValueError as error:
        raise UserError(
            "The month must look like 2026-11.", field="month", code="invalid_month"
        ) from error


def list_report_rows(user: User, moment: datetime) -> list[ledger.UsageRow]:
    """The monthly report: everything for admins, their own teams for leads."""
    visible_ids = get_visible_team_ids(user)
    if visible_ids is None:
        return ledger.build_month_report(moment)
    names = set(Team.objects.filter(pk__in=visible_ids).values_list("name", flat=True))
    return [row for row in ledger.build_month_report(moment) if row.team in names]


def find_intervals(user: User, begin: datetime) -> QuerySet[Allocation]:
    """Allocations since `begin`: all for admins, else those of the user and of the teams that they
    lead.
    """
    intervals = ledger.find_overlapping(begin, timezone.now() + timedelta(seconds=1))
    visible_ids = get_visible_team_ids(user)
    if visible_ids is None:
        return intervals
    return intervals.filter(Q(team__in=visible_ids) | Q(user=user))
