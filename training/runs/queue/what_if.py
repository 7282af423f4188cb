"""Simulate an edit of a quota or a pool before it is saved: which waiting runs would start earlier
or later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from django.utils import timezone

from training.gpus import ledger
from training.gpus.models import Pool, Quota
from training.gpus.scheduling import eta
from training.gpus.scheduling.load_state import build_team_quota
from training.gpus.scheduling.state import NO_TEAM, PoolState
from training.runs.models import Run
from training.runs.queue import admission, durations


@dataclass(frozen=True)
class StartShift:
    """A waiting run whose start an edit would change. Seconds from now; None if nothing known would
    let it start.
    """

    run: Run
    seconds_before: float | None
    seconds_after: float | None

    @property
    def is_later(self) -> bool:
        return (self.seconds_after if self.seconds_after is not None else math.inf) > (
            self.seconds_before if self.seconds_before is not None else math.inf
        )


def simulate_quota_edit(quota: Quota) -> list[StartShift]:
    """Runs whose start would change with this quota, which is not saved.

    Runs that would start later come first, then the order is by the time they were queued.
    """
    now = timezone.now()
    used = ledger.get_seconds_this_month("team_id", now, device__pool=quota.pool).get(
        quota.team_id, 0.0
    )
    before = load_current_state(quota.pool)
    after = replace(
        before, teams={**before.teams, quota.team_id or NO_TEAM: build_team_quota(quota, used)}
    )
    return find_start_shifts(before, after)


def simulate_pool_edit(pool: Pool) -> list[StartShift]:
    """The same for the settings of a pool."""
    before = load_current_state(Pool.objects.get(pk=pool.pk))
    after = replace(
        before,
        runs_per_device=pool.runs_per_device,
        min_run_seconds=float(pool.min_run_seconds),
        is_on_hold=pool.is_on_hold,
    )
    return find_start_shifts(before, after)


def load_current_state(pool: Pool) -> PoolState:
    return admission.build_pool_state(
        pool, admission.get_waiting_runs(pool), timezone.now(), durations.get_typical_durations()
    )


def find_start_shifts(before: PoolState, after: PoolState) -> list[StartShift]:
    now = before.now
    shifts = eta.compare_start_times(before, after, now)
    runs = Run.objects.select_related("owner", "team").in_bulk(list(shifts))

    def to_relative(at: float) -> float | None:
        return at - now if at < math.inf else None

    rows = [
        StartShift(runs[run], to_relative(start_before), to_relative(start_after))
        for run, (start_before, start_after) in shifts.items()
        if run in runs
    ]
    return sorted(rows, key=lambda row: (not row.is_later, row.run.queued_at))
