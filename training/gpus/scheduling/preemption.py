"""Choose which runs to evict so that a run within its team's guarantee, or an urgent one, can
start: as few as possible, the newest first.

Only background runs and runs beyond their team's guarantee can be evicted, not within
`min_run_seconds` of their start and at most three times a day. An evicted run is outside its team's
guarantee and therefore cannot evict others, so two runs never evict each other in turn
(Kueue #3779).
"""

from __future__ import annotations

from training.gpus.scheduling.placement import PlacementState
from training.gpus.scheduling.state import RunningRun, WaitingRun


def find_victims(
    placement: PlacementState, pending: WaitingRun, now: float
) -> tuple[int, list[RunningRun]] | None:
    """Return the device and the runs to evict from it, or None if no eviction would help."""
    preemptible = find_preemptible(placement, now)
    best: tuple[tuple[float, ...], int, list[RunningRun]] | None = None
    for device in placement.devices.values():
        if not device.is_schedulable or device.reserved_for is not None:
            continue
        # Add victims until the run fits
        victims: list[RunningRun] = []
        for job in sorted(
            (job for job in placement.jobs_on[device.id] if job.run in preemptible),
            key=_eviction_order,
        ):
            if placement.can_fit(pending, device.id, without=victims):
                break
            victims.append(job)
        if not victims or not placement.can_fit(pending, device.id, without=victims):
            continue
        # A later, larger victim can make an earlier one unnecessary
        for job in list(victims):
            rest = [other for other in victims if other is not job]
            if placement.can_fit(pending, device.id, without=rest):
                victims = rest
        cost = (
            len(victims),
            sum(job.priority != "background" for job in victims),
            -min(job.started for job in victims),
        )
        if best is None or cost < best[0]:
            best = (cost, device.id, victims)
    return (best[1], best[2]) if best else None


def find_preemptible(placement: PlacementState, now: float) -> set[int]:
    """Runs that may be evicted: background runs, and each team's newest runs beyond its
    guarantee.
    """
    by_team: dict[int, list[RunningRun]] = {}
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
            job.team == team and job.priority == "urgent" for job in placement.running_jobs.values()
        )
        num_excess = len(jobs) + urgent_count - placement.pool_state.quota_for(team).guaranteed
        preemptible |= {
            job.run for job in sorted(jobs, key=lambda job: -job.started)[: max(0, num_excess)]
        }
    return {
        run
        for run in preemptible
        if not placement.running_jobs[run].is_protected
        and now - placement.running_jobs[run].started >= placement.pool_state.min_run_seconds
    }


def _eviction_order(job: RunningRun) -> tuple[bool, float]:
    """Background runs first, then the newest."""
    return (job.priority != "background", -job.started)
