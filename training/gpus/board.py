"""Who is on which device, and what still fits there: the bookkeeping under the scheduler. It decides nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from training.gpus.scene import Holding, Request, Scene


class Board:
    """A scene whose runs come and go."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.cards = {card.id: card for card in scene.cards}
        self.on: dict[int, list[Holding]] = {card.id: [] for card in scene.cards}
        self.where: dict[int, Holding] = {}
        self.running: dict[int, int] = defaultdict(int)  # of a team: what counts against its guarantee
        self.background: dict[int, int] = defaultdict(int)
        self.of_user: dict[int, int] = defaultdict(int)
        self.committed: dict[tuple[str, int], float] = defaultdict(float)  # device-seconds that running runs will still take
        for held in scene.holdings:
            self.take(held, since=scene.now)
        self.open = {card.id for card in scene.cards if self.has_place(card.id)}

    def take(self, held: Holding, since: float) -> None:
        """`since`: from when on its time is not in the ledger yet."""
        self.on[held.card].append(held)
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
        counts = self.background if held.priority == "background" else self.running
        counts[held.team] -= 1
        self.of_user[held.user] -= 1
        self.look_again(held.card)
        return held

    def room(self, card: int) -> int:
        return self.cards[card].memory - sum(held.memory or self.cards[card].memory for held in self.on[card])

    def fits(self, request: Request, card: int, *, without: Iterable[Holding] = (), beside: int = 0) -> bool:
        """Whether a device takes this run, once `without` are gone and with `beside` bytes kept free."""
        gone = set(without)
        there = [held for held in self.on[card] if held not in gone]
        if not there and not beside:
            return request.memory is None or request.memory <= self.cards[card].memory
        if request.memory is None or any(held.memory is None for held in there):
            return False
        taken = sum(held.memory or 0 for held in there) + beside
        return len(there) + bool(beside) < self.scene.most_a_card and taken + request.memory <= self.cards[card].memory

    def smallest(self) -> int:
        return min((card.memory for card in self.scene.cards if card.usable), default=0)

    def tell_to_leave(self, card: int, victims: Iterable[Holding], keep_for: int) -> None:
        going = set(victims)
        self.on[card] = [replace(held, leaving=True) if held in going else held for held in self.on[card]]
        self.where |= {held.run: held for held in self.on[card]}
        self.cards[card] = replace(self.cards[card], kept_for=keep_for)
        self.look_again(card)

    def look_again(self, card: int) -> None:
        (self.open.add if self.has_place(card) else self.open.discard)(card)

    def has_place(self, card: int) -> bool:
        there = self.on[card]
        if not self.cards[card].usable:
            return False
        return not there or (len(there) < self.scene.most_a_card and all(held.memory is not None for held in there))
