"""Who is on which device, and what still fits there: the bookkeeping under the scheduler. It
decides nothing.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from training.gpus.scheduling.state import Card, Holding, Request, Scene


class Board:
    """A scene whose runs come and go."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.cards = {card.id: card for card in scene.cards}
        self.on: dict[int, list[Holding]] = {card.id: [] for card in scene.cards}
        self.where: dict[int, Holding] = {}
        # Of a team: what counts against its guarantee
        self.running: dict[int, int] = defaultdict(int)
        self.background: dict[int, int] = defaultdict(int)
        self.of_user: dict[int, int] = defaultdict(int)
        # Device-seconds that running runs will still take
        self.committed: dict[tuple[str, int], float] = defaultdict(float)
        self.open: list[
            tuple[int, int]
        ] = []  # devices that take one more run, by the room that is left on them: (bytes, device)
        self.entry: dict[int, tuple[int, int]] = {}
        self.known_ends: dict[int, dict[int | None, float]] = {}
        usable = [card.room for card in scene.cards if card.usable]
        self.usable = len(usable)  # devices
        self._idle: list[int] | None = None
        self.smallest, self.largest = (
            min(usable, default=0),
            max((card.memory for card in scene.cards), default=0),
        )
        self.kept_by = {card.kept_for: card.id for card in scene.cards if card.kept_for is not None}
        for held in scene.holdings:
            self.take(held, since=scene.now)
        for card in scene.cards:
            self.look_again(card.id)

    def take(self, held: Holding, since: float) -> None:
        """`since`: from when on its time is not in the ledger yet."""
        self.on[held.card].append(held)
        self._idle = None
        self.where[held.run] = held
        counts = self.background if held.priority == "background" else self.running
        counts[held.team] += 1
        self.of_user[held.user] += 1
        left = held.ends - since
        if left < math.inf:
            self.committed["team", held.team] += max(0.0, left)
            self.committed["user", held.user] += max(0.0, left)

    def gone(self, run: int) -> Holding:
        """A run has left its device."""
        held = self.where.pop(run)
        self.on[held.card].remove(held)
        self._idle = None
        counts = self.background if held.priority == "background" else self.running
        counts[held.team] -= 1
        self.of_user[held.user] -= 1
        self.look_again(held.card)
        return held

    def room(self, card: int) -> int:
        return self.cards[card].room - sum(
            held.memory or self.cards[card].memory for held in self.on[card]
        )

    def fits(
        self, request: Request, card: int, *, without: Iterable[Holding] = (), beside: int = 0
    ) -> bool:
        """Whether a device takes this run, once `without` are gone and with `beside` bytes kept
        free.
        """
        gone = set(without)
        there = [held for held in self.on[card] if held not in gone]
        if not there and not beside:
            return request.memory is None or request.memory <= self.cards[card].room
        if request.memory is None or any(held.memory is None for held in there):
            return False
        taken = sum(held.memory or 0 for held in there) + beside
        return (
            len(there) + bool(beside) < self.scene.most_a_card
            and taken + request.memory <= self.cards[card].room
        )

    def tell_to_leave(self, card: int, victims: Iterable[Holding], keep_for: int) -> None:
        going = set(victims)
        self.on[card] = [
            replace(held, leaving=True) if held in going else held for held in self.on[card]
        ]
        self.where |= {held.run: held for held in self.on[card]}
        self.cards[card] = replace(self.cards[card], kept_for=keep_for)
        self.kept_by[keep_for] = card
        self.look_again(card)

    def free_at(self, request: Request, card: Card) -> float:
        """When enough of the runs on a device should have ended for this one. Kept until the device
        changes.
        """
        known = self.known_ends[card.id]
        if request.memory not in known:
            known[request.memory] = self._free_at(request, card)
        return known[request.memory]

    def _free_at(self, request: Request, card: Card) -> float:
        there = sorted(self.on[card.id], key=lambda held: held.ends)
        if not there:
            return -math.inf
        if request.memory is None or self.scene.most_a_card == 1:
            return there[-1].ends
        room, left = self.room(card.id), len(there)
        for held in there:
            room, left = room + (held.memory or card.memory), left - 1
            if room >= request.memory and left < self.scene.most_a_card:
                return held.ends
        return math.inf

    def numbers(self, request: Request) -> dict[str, float | int | str]:
        """What a sentence about a missing device tells."""
        empty = self.taken_of_idle()
        return {
            "needs": request.memory or 0,
            "devices": self.usable,
            "idle": len(empty),
            "taken": min(empty, default=0),
            "unusable": len(self.cards) - self.usable,
            "team": self.scene.share(request.team).name,
            "holds": self.running[request.team] + self.background[request.team],
            "guaranteed": self.scene.share(request.team).guaranteed,
        }

    def taken_of_idle(self) -> list[int]:
        """What other programs hold of each device that no run is on; kept until a run comes or
        goes, for every barrier asks.
        """
        if self._idle is None:
            self._idle = [
                card.taken for card in self.cards.values() if card.usable and not self.on[card.id]
            ]
        return self._idle

    def look_again(self, card: int) -> None:
        """Put a device where it belongs among the open ones, or take it out."""
        self.known_ends[card] = {}
        old = self.entry.pop(card, None)
        if old is not None:
            del self.open[bisect.bisect_left(self.open, old)]
        if self.has_place(card):
            self.entry[card] = (self.room(card), card)
            bisect.insort(self.open, self.entry[card])

    @property
    def most_room(self) -> int:
        """Bytes on the emptiest device."""
        return self.open[-1][0] if self.open else -1

    def has_place(self, card: int) -> bool:
        there = self.on[card]
        if not self.cards[card].usable:
            return False
        return not there or (
            len(there) < self.scene.most_a_card and all(held.memory is not None for held in there)
        )
