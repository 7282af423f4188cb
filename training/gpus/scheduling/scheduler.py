"""Who starts now, who waits, and who must go: one admission pass over a scene. The same code tells
times by running on a copy.

Order: inside the guarantee before borrowing, then class, then the team that has least over its
    guarantee for its weight, then the person who used least of late, then who asked first. The
    first run that finds no device keeps one (EASY backfill, Lifka 1995):
others start there only if they end before it can begin, or fit beside it.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, replace

from training.gpus.scheduling.placement import Board
from training.gpus.scheduling.preemption import victims_for
from training.gpus.scheduling.state import CLASSES, Barrier, Decision, Holding, Request, Scene

# Runs behind the head that a pass tries to fit in (Slurm's bf_max_job_test: 500)
MOST_EXAMINED = 200
Line = tuple[int, int]  # team and user: their runs in the order in which they want them


@dataclass(frozen=True)
class Kept:
    """The device that waits for the head of the queue, and from when."""

    request: Request
    card: int
    at: float


class Scheduler(Board):
    """A scene that moves: `admit` starts runs, `release` ends them."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.charged: dict[int, float] = defaultdict(float)
        self.kept: Kept | None = None
        self.lines: dict[Line, list[Request]] = defaultdict(list)
        self.at: dict[Line, int] = defaultdict(int)  # how far a pass has come in each
        self.heap: list[tuple[tuple[float, ...], int, Line]] = []
        self.version: dict[Line, int] = defaultdict(int)
        self.lines_of: dict[int, set[Line]] = defaultdict(set)
        self.requests = {request.run: request for request in scene.waiting}
        for request in scene.waiting:
            line = (request.team, request.user)
            self.lines[line].append(request)
            self.lines_of[request.team].add(line)
        self.needs = sorted(self.need(request) for request in scene.waiting)
        for line, requests in self.lines.items():
            requests.sort(key=lambda r: r.rank)
            self._push(line)

    # -- one pass

    def admit(self, now: float, *, evict: bool = True, depth: int = MOST_EXAMINED) -> Decision:
        """Start what may start at `now`; at most `depth` runs that find no device are looked at.

        With `evict`, say who must make room for runs inside their team's guarantee.
        """
        made = Decision()
        self.kept = None
        aside: set[Line] = set()
        looked = 0
        while (
            self.heap and looked < depth and (evict or self.somebody_fits()) and not self.scene.held
        ):
            line = self._pop()
            if line is None:
                break
            aside.add(line)
            request = self.lines[line][self.at[line]]
            barrier = self.limits(request)
            if barrier is not None and barrier.why != "pause":
                self._give_up_kept(request, made)
            if barrier is None:
                card = self.place(request, now)
                if card is not None:
                    made.starts.append(self.start(request, card, now))
                    continue
                barrier = self._no_room(request, now, made, evict)
                looked += 1
            made.barriers[request.run] = barrier
            if not barrier.why.startswith(("team", "user")):  # else none of this line can start
                self.at[line] += 1  # the next of them comes in when it is its turn
                self._push(line)
        for line in aside:
            self.at[line] = 0
            self._push(line)
        return made

    def somebody_fits(self) -> bool:
        """Whether the smallest of those who wait finds room on the emptiest device; without, a pass
        has nothing to do.
        """
        return bool(self.needs) and self.needs[0] <= self.most_room

    def start(self, request: Request, card: int, now: float) -> Holding:
        held = Holding(
            request.run,
            card,
            request.team,
            request.user,
            now,
            request.memory,
            request.priority,
            now + request.seconds,
        )
        self.lines[request.team, request.user].remove(request)
        del self.needs[bisect.bisect_left(self.needs, self.need(request))]
        self.take(held, since=now)
        # The entry is charged at once
        self.charged[request.user] += request.seconds if request.seconds < math.inf else 3600.0
        if self.cards[card].kept_for == request.run:
            self.cards[card] = replace(self.cards[card], kept_for=None)
            del self.kept_by[request.run]
        self.look_again(card)
        self._touch(request.team)
        return held

    def release(self, run: int) -> None:
        held = self.gone(run)
        self._touch(held.team)

    # -- what may be

    def limits(self, request: Request) -> Barrier | None:
        """What forbids this run to start, however many devices are free."""
        share, person = self.scene.share(request.team), self.scene.person(request.user)
        holds = (
            self.running[request.team]
            + self.background[request.team]
            + self.promised(request, "team")
        )
        mine = person.elsewhere + self.of_user[request.user] + self.promised(request, "user")
        limit, most = share.limit, person.running
        will_take = self.committed["team", request.team], self.committed["user", request.user]
        checks: tuple[tuple[bool, str, dict[str, int | str]], ...] = (
            (share.held, "team_held", {"team": share.name}),
            (
                limit is not None and holds >= limit,
                "team_limit",
                {"team": share.name, "holds": holds, "limit": limit or 0},
            ),
            (
                share.seconds_left is not None and share.seconds_left <= will_take[0],
                "team_hours",
                {"team": share.name},
            ),
            (most is not None and mine >= most, "user_limit", {"holds": mine, "limit": most or 0}),
            (
                person.seconds_left is not None and person.seconds_left <= will_take[1],
                "user_hours",
                {},
            ),
            (not request.due, "pause", {}),
        )
        return next(
            (Barrier(why, facts) for broken, why, facts in checks if broken), None
        ) or self.never(request)

    def never(self, request: Request) -> Barrier | None:
        """What would forbid it on an empty pool, too."""
        most = self.scene.share(request.team).most_memory
        need = self.need(request)
        if most is not None and need > most:
            return Barrier("most_memory", {"needs": need, "most": most})
        if self.scene.cards and need > self.largest:
            return Barrier("never_fits", {"needs": need, "largest": self.largest})
        return None

    def inside(self, request: Request) -> bool:
        """Whether this run would be inside its team's guarantee; background never is."""
        holds = self.running[request.team] + self.promised(request, "team")
        return (
            request.priority != "background" and holds < self.scene.share(request.team).guaranteed
        )

    def promised(self, request: Request, whose: str) -> int:
        """Devices that are kept for other waiting runs of the same team or user: as good as
        held.
        """
        mine = getattr(request, whose)
        others = (
            self.requests[run]
            for run in self.kept_by
            if run != request.run and run in self.requests
        )
        return sum(getattr(other, whose) == mine for other in others)

    def place(self, request: Request, now: float) -> int | None:
        """The device with the least room left that takes this run."""
        mine = self.kept_by.get(request.run)
        if mine is not None:
            return mine if self.cards[mine].usable and self.fits(request, mine) else None
        for _, card in self.open[bisect.bisect_left(self.open, (self.need(request), -1)) :]:
            if self.cards[card].kept_for is not None or not self.fits(request, card):
                continue
            if self.kept is None or self.kept.card != card or self._spares(self.kept, request, now):
                return card
        return None

    def need(self, request: Request) -> int:
        """Room that it needs at least; one without a forecast needs a device that nobody is on."""
        return request.memory if request.memory is not None else self.smallest

    # -- inside

    def _no_room(self, request: Request, now: float, made: Decision, evict: bool) -> Barrier:
        coming = self.kept_by.get(request.run)
        if coming is not None:
            leaving = ", ".join(str(held.run) for held in self.on[coming])
            return Barrier("leaving", {"for": leaving}) if leaving else Barrier("checked")
        if evict and (self.inside(request) or request.priority == "urgent"):
            found = victims_for(self, request, now)
            if found is not None:
                card, victims = found
                made.evictions |= {held.run: request.run for held in victims}
                self.tell_to_leave(card, victims, request.run)
                return Barrier("leaving", {"for": ", ".join(str(held.run) for held in victims)})
        if self.kept is None:
            self.kept = self._keep_one(request, now)
        if (
            self.kept is None
            or self.kept.request.run == request.run
            or self.most_room < self.need(request)
        ):
            return Barrier("full", self.numbers(request))
        return Barrier("kept", {**self.numbers(request), "head": self.kept.request.run})

    def _give_up_kept(self, request: Request, made: Decision) -> None:
        """What was freed for a run that may not start now is for all again."""
        card = self.kept_by.pop(request.run, None)
        if card is not None:
            self.cards[card] = replace(self.cards[card], kept_for=None)
            made.given_up.append(request.run)

    def _keep_one(self, request: Request, now: float) -> Kept | None:
        """Where and when the head can begin first, going by the expected ends."""
        best: Kept | None = None
        for card in self.cards.values():
            if not card.usable or card.kept_for is not None or (request.memory or 0) > card.room:
                continue
            at = max(now, self.free_at(request, card))
            if best is None or at < best.at:
                best = Kept(request, card.id, at)
        return best

    def _spares(self, kept: Kept, request: Request, now: float) -> bool:
        """Whether the head of the queue begins no later if this run starts on its device."""
        head = kept.request
        if head.run == request.run or now + request.seconds <= kept.at < math.inf:
            return True
        leave = [held for held in self.on[kept.card] if held.ends <= kept.at]
        return head.memory is not None and self.fits(
            request, kept.card, without=leave, beside=head.memory
        )

    def key_of(self, request: Request) -> tuple[float, ...]:
        """Its place in the order: the smaller comes first."""
        share = self.scene.share(request.team)
        over = (self.running[request.team] - share.guaranteed) / share.weight
        used = self.scene.person(request.user).used + self.charged[request.user]
        return (
            not self.inside(request),
            CLASSES.index(request.priority),
            over,
            used,
            request.submitted,
            request.run,
        )

    def _push(self, line: Line) -> None:
        self.version[line] += 1
        if self.at[line] < len(self.lines[line]):
            key = self.key_of(self.lines[line][self.at[line]])
            heapq.heappush(self.heap, (key, self.version[line], line))

    def _pop(self) -> Line | None:
        while self.heap:
            _, version, line = heapq.heappop(self.heap)
            if version == self.version[line]:
                return line
        return None

    def _touch(self, team: int) -> None:
        """A team's place in the order has changed."""
        for line in self.lines_of[team]:
            self._push(line)
