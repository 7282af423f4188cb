"""Read a pool from the database into the scheduler's PoolState: devices, running runs, quotas and
usage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from django.db.models import Count

from training.gpus import ledger
from training.gpus.devices import is_schedulable
from training.gpus.models import Allocation, Device, PersonalQuota, Pool, Quota
from training.gpus.scheduling.state import (
    EVICTION_GRACE_SECONDS,
    MAX_EVICTIONS_PER_DAY,
    NO_TEAM,
    DeviceState,
    PoolState,
    RunningRun,
    TeamQuota,
    UserUsage,
    WaitingRun,
)


def load_pool_state(
    pool: Pool, now: datetime, waiting: Sequence[WaitingRun], ends: Mapping[int, float]
) -> PoolState:
    """Build the state from the database.

    `ends` has the expected ends of the running runs in seconds since 1970. A run that is not in it
    has no expected end.
    """
    devices = Device.objects.filter(pool=pool).select_related("host")
    allocations = list(Allocation.objects.filter(device__pool=pool, released_at=None))
    occupied_ids = {allocation.device_id for allocation in allocations}
    device_states = [
        DeviceState(
            d.pk,
            d.total_bytes,
            is_schedulable(d),
            d.reserved_for,
            get_used_by_others(d, is_occupied=d.pk in occupied_ids),
        )
        for d in devices
    ]
    return PoolState(
        pool=pool.name,
        devices=device_states,
        running=load_running_runs(allocations, now, ends),
        waiting=waiting,
        teams={
            quota.team_id or NO_TEAM: team_quota
            for quota, team_quota in load_team_quotas(pool, now)
        },
        users=load_user_usage(pool, now),
        runs_per_device=pool.runs_per_device,
        min_run_seconds=pool.min_run_seconds,
        is_on_hold=pool.is_on_hold,
        now=now.timestamp(),
    )


def get_used_by_others(device: Device, *, is_occupied: bool) -> int:
    """Bytes used by processes other than runs.

    On an idle device this is all memory in use. On an occupied device it is what was in use before
    its first run started, plus what the inference server uses now.
    """
    return device.baseline_bytes + device.inference_bytes if is_occupied else device.used_bytes


def load_static_limits(pool: Pool, team: int) -> PoolState:
    """Only what decides whether a run could ever start: the devices and the team's quota."""
    device_states = [
        DeviceState(device.pk, device.total_bytes) for device in Device.objects.filter(pool=pool)
    ]
    quota = Quota.objects.filter(pool=pool, team=team or None).select_related("team").first()
    return PoolState(
        pool.name, device_states, teams={team: build_team_quota(quota, 0.0)} if quota else {}
    )


def load_running_runs(
    allocations: Sequence[Allocation], now: datetime, ends: Mapping[int, float]
) -> list[RunningRun]:
    recent_evictions = Allocation.objects.filter(
        run_id__in=[a.run_id for a in allocations], evicted_at__gt=now - timedelta(days=1)
    )
    eviction_counts = {
        row["run_id"]: row["times"]
        for row in recent_evictions.values("run_id").annotate(times=Count("pk"))
    }
    return [
        RunningRun(
            run=allocation.run_id,
            device_id=allocation.device_id,
            team=allocation.team_id or NO_TEAM,
            user=allocation.user_id,
            started=allocation.started_at.timestamp(),
            memory=allocation.reserved_bytes,
            priority=allocation.priority,
            expected_end=now.timestamp() + EVICTION_GRACE_SECONDS
            if allocation.evicted_at
            else ends.get(allocation.run_id, math.inf),
            is_evicting=allocation.evicted_at is not None,
            is_protected=eviction_counts.get(allocation.run_id, 0) >= MAX_EVICTIONS_PER_DAY,
        )
        for allocation in allocations
    ]


def load_team_quotas(pool: Pool, now: datetime) -> list[tuple[Quota, TeamQuota]]:
    quotas = list(Quota.objects.filter(pool=pool).select_related("team"))
    has_hard_budget = any(get_seconds_left(quota, 0.0) is not None for quota in quotas)
    used = (
        ledger.get_seconds_this_month("team_id", now, device__pool=pool) if has_hard_budget else {}
    )
    return [(quota, build_team_quota(quota, used.get(quota.team_id, 0.0))) for quota in quotas]


def build_team_quota(quota: Quota, used: float) -> TeamQuota:
    return TeamQuota(
        name=quota.team.name if quota.team else "no team",
        guaranteed=quota.guaranteed,
        limit=quota.limit,
        weight=quota.weight,
        seconds_left=get_seconds_left(quota, used),
        max_bytes=quota.max_bytes,
        is_on_hold=quota.is_on_hold,
    )


def get_seconds_left(quota: Quota | PersonalQuota, used: float) -> float | None:
    """Seconds left of a hard budget; None if there is no budget or only a soft one."""
    return (
        3600 * quota.hours_per_month - used
        if quota.is_hard_budget and quota.hours_per_month is not None
        else None
    )


def load_user_usage(pool: Pool, now: datetime) -> dict[int, UserUsage]:
    """Each user's recent usage and limits. The limits apply to all pools together."""
    quotas = {quota.user_id: quota for quota in PersonalQuota.objects.all()}
    recent_usage = ledger.compute_decayed_usage(now)
    has_hard_budget = any(get_seconds_left(quota, 0.0) is not None for quota in quotas.values())
    used = ledger.get_seconds_this_month("user_id", now) if has_hard_budget else {}
    elsewhere_counts = Counter(
        Allocation.objects.filter(released_at=None)
        .exclude(device__pool=pool)
        .values_list("user", flat=True)
    )
    usage_by_user = {}
    for user in {*quotas, *recent_usage}:
        quota = quotas.get(user) or PersonalQuota()
        remaining_seconds = get_seconds_left(quota, used.get(user, 0.0))
        usage_by_user[user] = UserUsage(
            quota.max_running,
            elsewhere_counts[user],
            remaining_seconds,
            recent_usage.get(user, 0.0),
        )
    return usage_by_user
