"""A pool as the scheduler sees it, read from the rows in one go: devices, quotas, people, and who
holds what.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from django.db.models import Count

from training.gpus import ledger
from training.gpus.devices import usable
from training.gpus.models import Allocation, Device, PersonalQuota, Pool, Quota
from training.gpus.scheduling.state import (
    LEAVING_SECONDS,
    MOST_EVICTIONS,
    NOBODY,
    Card,
    Holding,
    Person,
    Request,
    Scene,
    Share,
)


def scene_of(
    pool: Pool, now: datetime, waiting: Sequence[Request], ends: Mapping[int, float]
) -> Scene:
    """`ends`: expected end of the runs that hold a device here, in seconds since 1970."""
    devices = Device.objects.filter(pool=pool).select_related("host")
    allocations = list(Allocation.objects.filter(device__pool=pool, released_at=None))
    held = {one.device_id for one in allocations}
    cards = [
        Card(d.pk, d.total_bytes, usable(d), d.kept_for, taken_of(d, held=d.pk in held))
        for d in devices
    ]
    return Scene(
        pool=pool.name,
        cards=cards,
        holdings=holdings_of(allocations, now, ends),
        waiting=waiting,
        teams={quota.team_id or NOBODY: share for quota, share in shares_of(pool, now)},
        people=people_of(pool, now),
        most_a_card=pool.runs_per_device,
        shortest=pool.shortest_seconds,
        held=pool.held,
        now=now.timestamp(),
    )


def taken_of(device: Device, *, held: bool) -> int:
    """What others than runs hold of a device: all that is in use, or was when the first of its runs
    came.
    """
    return device.idle_bytes + device.answering_bytes if held else device.used_bytes


def bounds_of(pool: Pool, team: int) -> Scene:
    """Only what decides whether a run could ever start: the devices, and the team's quota."""
    cards = [Card(one.pk, one.total_bytes) for one in Device.objects.filter(pool=pool)]
    quota = Quota.objects.filter(pool=pool, team=team or None).select_related("team").first()
    return Scene(pool.name, cards, teams={team: share_of(quota, 0.0)} if quota else {})


def holdings_of(
    allocations: Sequence[Allocation], now: datetime, ends: Mapping[int, float]
) -> list[Holding]:
    stopped = Allocation.objects.filter(
        run_id__in=[a.run_id for a in allocations], evicted_at__gt=now - timedelta(days=1)
    )
    times = {
        row["run_id"]: row["times"] for row in stopped.values("run_id").annotate(times=Count("pk"))
    }
    return [
        Holding(
            run=one.run_id,
            card=one.device_id,
            team=one.team_id or NOBODY,
            user=one.user_id,
            started=one.started_at.timestamp(),
            memory=one.reserved_bytes,
            priority=one.priority,
            ends=now.timestamp() + LEAVING_SECONDS
            if one.evicted_at
            else ends.get(one.run_id, math.inf),
            leaving=one.evicted_at is not None,
            spared=times.get(one.run_id, 0) >= MOST_EVICTIONS,
        )
        for one in allocations
    ]


def shares_of(pool: Pool, now: datetime) -> list[tuple[Quota, Share]]:
    quotas = list(Quota.objects.filter(pool=pool).select_related("team"))
    counted = any(seconds_left(quota, 0.0) is not None for quota in quotas)
    used = ledger.used_this_month("team_id", now, device__pool=pool) if counted else {}
    return [(quota, share_of(quota, used.get(quota.team_id, 0.0))) for quota in quotas]


def share_of(quota: Quota, used: float) -> Share:
    return Share(
        name=quota.team.name if quota.team else "no team",
        guaranteed=quota.guaranteed,
        limit=quota.limit,
        weight=quota.weight,
        seconds_left=seconds_left(quota, used),
        most_memory=quota.most_bytes,
        held=quota.on_hold,
    )


def seconds_left(quota: Quota | PersonalQuota, used: float) -> float | None:
    """Of a hard budget; None where there is none, or only a warning."""
    return (
        3600 * quota.hours_a_month - used
        if quota.hard and quota.hours_a_month is not None
        else None
    )


def people_of(pool: Pool, now: datetime) -> dict[int, Person]:
    """What each person used of late, and their own limits; these hold over all pools."""
    quotas = {quota.user_id: quota for quota in PersonalQuota.objects.all()}
    of_late = ledger.used_of_late(now)
    counted = any(seconds_left(quota, 0.0) is not None for quota in quotas.values())
    used = ledger.used_this_month("user_id", now) if counted else {}
    elsewhere = Counter(
        Allocation.objects.filter(released_at=None)
        .exclude(device__pool=pool)
        .values_list("user", flat=True)
    )
    found = {}
    for user in {*quotas, *of_late}:
        quota = quotas.get(user) or PersonalQuota()
        left = seconds_left(quota, used.get(user, 0.0))
        found[user] = Person(quota.running, elsewhere[user], left, of_late.get(user, 0.0))
    return found
