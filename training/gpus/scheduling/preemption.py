"""Who must go, so that a run inside its team's guarantee (or an urgent one) can start: as few as
possible, the newest first.

Only background and borrowed runs go; a run is left alone for a while after each start, and after
three times in a day. A run that goes is by then outside its team's guarantee, so it may evict
nobody in turn: no two runs can chase each other (Kueue #3779).
"""

from __future__ import annotations

from training.gpus.scheduling.placement import Board
from training.gpus.scheduling.state import Holding, Request


def victims_for(board: Board, request: Request, now: float) -> tuple[int, list[Holding]] | None:
    """The device and the runs that leave it; None where nobody can be asked to."""
    loose = removable(board, now)
    best: tuple[tuple[float, ...], int, list[Holding]] | None = None
    for card in board.cards.values():
        if not card.usable or card.kept_for is not None:
            continue
        going: list[Holding] = []
        for held in sorted((h for h in board.on[card.id] if h.run in loose), key=_readiness):
            if board.fits(request, card.id, without=going):
                break
            going.append(held)
        if not going or not board.fits(request, card.id, without=going):
            continue
        for held in list(going):  # one that the others made needless stays
            rest = [other for other in going if other is not held]
            if board.fits(request, card.id, without=rest):
                going = rest
        cost = (
            len(going),
            sum(h.priority != "background" for h in going),
            -min(h.started for h in going),
        )
        if best is None or cost < best[0]:
            best = (cost, card.id, going)
    return (best[1], best[2]) if best else None


def removable(board: Board, now: float) -> set[int]:
    """Runs that may be told to leave: background ones, and of each team the newest beyond its
    guarantee.
    """
    by_team: dict[int, list[Holding]] = {}
    found = set()
    for held in board.where.values():
        if held.leaving or held.priority == "urgent":
            continue
        if held.priority == "background":
            found.add(held.run)
        else:
            by_team.setdefault(held.team, []).append(held)
    for team, holdings in by_team.items():
        staying = sum(h.team == team and h.priority == "urgent" for h in board.where.values())
        spare = len(holdings) + staying - board.scene.share(team).guaranteed
        found |= {held.run for held in sorted(holdings, key=lambda h: -h.started)[: max(0, spare)]}
    return {
        run
        for run in found
        if not board.where[run].spared and now - board.where[run].started >= board.scene.shortest
    }


def _readiness(held: Holding) -> tuple[bool, float]:
    return (held.priority != "background", -held.started)
