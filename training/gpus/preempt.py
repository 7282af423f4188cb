"""Who must go, so that a run inside its team's guarantee (or an urgent one) can start: as few as possible, the newest first.

Only background and borrowed runs go; a run is left alone for a while after each start, and after three times in a day. A run that
goes is by then outside its team's guarantee, so it may evict nobody in turn: no two runs can chase each other (Kueue #3779).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.gpus.scene import Holding, Request

if TYPE_CHECKING:
    from training.gpus.scheduler import Scheduler


def victims_for(scheduler: Scheduler, request: Request, now: float) -> tuple[int, list[Holding]] | None:
    """The device and the runs that leave it; None where nobody can be asked to."""
    loose = removable(scheduler, now)
    best: tuple[tuple[float, ...], int, list[Holding]] | None = None
    for card in scheduler.cards.values():
        if not card.usable or card.kept_for is not None:
            continue
        going: list[Holding] = []
        for held in sorted((h for h in scheduler.on[card.id] if h.run in loose), key=_readiness):
            if scheduler.fits(request, card.id, without=going):
                break
            going.append(held)
        if not going or not scheduler.fits(request, card.id, without=going):
            continue
        for held in list(going):  # one that the others made needless stays
            rest = [other for other in going if other is not held]
            if scheduler.fits(request, card.id, without=rest):
                going = rest
        cost = (len(going), sum(h.priority != "background" for h in going), -min(h.started for h in going))
        if best is None or cost < best[0]:
            best = (cost, card.id, going)
    return (best[1], best[2]) if best else None


def removable(scheduler: Scheduler, now: float) -> set[int]:
    """Runs that may be told to leave: background ones, and of each team the newest beyond its guarantee."""
    by_team: dict[int, list[Holding]] = {}
    found = set()
    for held in scheduler.where.values():
        if held.leaving or held.priority == "urgent":
            continue
        if held.priority == "background":
            found.add(held.run)
        else:
            by_team.setdefault(held.team, []).append(held)
    for team, holdings in by_team.items():
        staying = sum(h.team == team and h.priority == "urgent" for h in scheduler.where.values())
        spare = len(holdings) + staying - scheduler.scene.share(team).guaranteed
        found |= {held.run for held in sorted(holdings, key=lambda h: -h.started)[: max(0, spare)]}
    return {
        run for run in found if not scheduler.where[run].spared and now - scheduler.where[run].started >= scheduler.scene.shortest
    }


def _readiness(held: Holding) -> tuple[bool, float]:
    return (held.priority != "background", -held.started)
