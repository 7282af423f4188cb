"""What an edit of a quota would do to those who wait, before it is made: the scheduler on a copy,
with the edit and without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from django.utils import timezone

from training.gpus import ledger
from training.gpus.models import Pool, Quota
from training.gpus.scheduling import eta
from training.gpus.scheduling.load_state import share_of
from training.gpus.scheduling.state import NOBODY, Scene
from training.runs.models import Run
from training.runs.queue import admission, durations


@dataclass(frozen=True)
class Moved:
    """A waiting run whose start an edit would move. Seconds from now; None: not before something
    else changes.
    """

    run: Run
    was: float | None
    will: float | None

    @property
    def later(self) -> bool:
        return (self.will if self.will is not None else math.inf) > (
            self.was if self.was is not None else math.inf
        )


def quota_edit(quota: Quota) -> list[Moved]:
    """Runs that would start sooner or later with this quota (which is not saved), those that wait
    longest first.
    """
    now = timezone.now()
    used = ledger.used_this_month("team_id", now, device__pool=quota.pool).get(quota.team_id, 0.0)
    before = scene_now(quota.pool)
    after = replace(before, teams={**before.teams, quota.team_id or NOBODY: share_of(quota, used)})
    return moved(before, after)


def pool_edit(pool: Pool) -> list[Moved]:
    """The same for a pool's own settings."""
    before = scene_now(Pool.objects.get(pk=pool.pk))
    after = replace(
        before,
        most_a_card=pool.runs_per_device,
        shortest=float(pool.shortest_seconds),
        held=pool.held,
    )
    return moved(before, after)


def scene_now(pool: Pool) -> Scene:
    return admission.picture(
        pool, admission.waiting_runs(pool), timezone.now(), durations.usual_times()
    )


def moved(before: Scene, after: Scene) -> list[Moved]:
    now = before.now
    found = eta.dry_run(before, after, now)
    runs = Run.objects.select_related("owner", "team").in_bulk(list(found))

    def seconds(at: float) -> float | None:
        return at - now if at < math.inf else None

    rows = [
        Moved(runs[run], seconds(was), seconds(will))
        for run, (was, will) in found.items()
        if run in runs
    ]
    return sorted(rows, key=lambda row: (not row.later, row.run.queued_at))
