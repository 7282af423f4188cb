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
    placement: PlacementState, waiting_run: WaitingRun, now: float
) -> tuple[int, list[RunningRun]] | None:
    """Return the device and the runs to evict from it, or None if no eviction would help."""
    preemptible = find_preemptible(placement, now)
    best: tuple[tuple[float, ...], int, list[RunningRun]] | None = None
    for device in placement.devices.values():
        if not device.is_schedulable or device.reserved_for is not None:
            continue
        # Add victims until the run fits
        victims: list[RunningRun] = []
        for running in sorted(
            (running for running in placement.runs_on[device.id] if running.run in preemptible),
            key=_eviction_order,
        ):
            if placement.can_fit(waiting_run, device.id, without=victims):
                break
            victims.append(running)
        if not victims or not placement.can_fit(waiting_run, device.id, without=victims):
            continue
        # A later, larger victim can make an earlier one unnecessary
        for running in list(victims):
            rest = [other for other in victims if other is not running]
            if placement.can_fit(waiting_run, device.id, without=rest):
                victims = rest
        cost = (
            len(victims),
            sum(running.priority != "background" for running in victims),
            -min(running.started for running in victims),
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
    for running in placement.running.values():
        if running.is_evicting or running.priority == "urgent":
            continue
        if running.priority == "background":
            preemptible.add(running.run)
        else:
            by_team.setdefault(running.team, []).append(running)
    for team, team_runs in by_team.items():
        urgent_count = sum(
            running.team == team and running.priority == "urgent"
            for running in placement.running.values()
        )
        num_excess = len(team_runs) + urgent_count - placement.pool_state.quota_for(team).guaranteed
        preemptible |= {
            running.run
            for running in sorted(team_runs, key=lambda running: -running.started)[
                : max(0, num_excess)
            ]
        }
    return {
        run
        for run in preemptible
        if not placement.running[run].is_protected
        and now - placement.running[run].started >= placement.pool_state.min_run_seconds
    }


def _eviction_order(running: RunningRun) -> tuple[bool, float]:
    """Background runs first, then the newest."""
    return (running.priority != "background", -running.started)
