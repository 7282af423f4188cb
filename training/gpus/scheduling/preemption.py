"""Who must go, so that a run inside its team's guarantee (or an urgent one) can start: as few as
possible, the newest first.

Only background and borrowed runs go; a run is left alone for a while after each start, and after
three times in a day. A run that goes is by then outside its team's guarantee, so it may evict
nobody in turn: no two runs can chase each other (Kueue #3779).
"""

from __future__ import annotations

from training.gpus.scheduling.placement import PlacementState
from training.gpus.scheduling.state import PendingJob, RunningJob


def victims_for(
    placement: PlacementState, pending: PendingJob, now: float
) -> tuple[int, list[RunningJob]] | None:
    """The device and the runs that leave it; None where nobody can be asked to."""
    preemptible = find_preemptible(placement, now)
    best: tuple[tuple[float, ...], int, list[RunningJob]] | None = None
    for device in placement.devices.values():
        if not device.is_schedulable or device.reserved_for is not None:
            continue
        victims: list[RunningJob] = []
        for job in sorted(
            (h for h in placement.jobs_on[device.id] if h.run in preemptible), key=_eviction_order
        ):
            if placement.can_place(pending, device.id, without=victims):
                break
            victims.append(job)
        if not victims or not placement.can_place(pending, device.id, without=victims):
            continue
        for job in list(victims):  # one that the others made needless stays
            rest = [other for other in victims if other is not job]
            if placement.can_place(pending, device.id, without=rest):
                victims = rest
        cost = (
            len(victims),
            sum(h.priority != "background" for h in victims),
            -min(h.started for h in victims),
        )
        if best is None or cost < best[0]:
            best = (cost, device.id, victims)
    return (best[1], best[2]) if best else None


def find_preemptible(placement: PlacementState, now: float) -> set[int]:
    """Runs that may be told to leave: background ones, and of each team the newest beyond its
    guarantee.
    """
    by_team: dict[int, list[RunningJob]] = {}
    preemptible = set()
    for job in placement.running_jobs.values():
        if job.is_evicting or job.priority == "urgent":
            continue
        if job.priority == "background":
            preemptible.add(job.run)
        else:
            by_team.setdefault(job.team, []).append(job)
    for team, jobs in by_team.items():
        urgent_count = sum(
            h.team == team and h.priority == "urgent" for h in placement.running_jobs.values()
        )
        num_excess = len(jobs) + urgent_count - placement.pool_state.quota_for(team).guaranteed
        preemptible |= {
            job.run for job in sorted(jobs, key=lambda h: -h.started)[: max(0, num_excess)]
        }
    return {
        run
        for run in preemptible
        if not placement.running_jobs[run].is_protected
        and now - placement.running_jobs[run].started >= placement.pool_state.min_run_seconds
    }


def _eviction_order(job: RunningJob) -> tuple[bool, float]:
    return (job.priority != "background", -job.started)
