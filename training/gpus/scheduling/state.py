"""What the scheduler sees of a pool: devices, who holds them, who waits, and the quotas. Plain
numbers; it knows no database.

Times are seconds on one clock, memory is bytes. A run takes one device, or a share of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Urgent is granted by admins; background is always preemptible
CLASSES = (
    "urgent",
    "normal",
    "background",
)
MOST_EVICTIONS = 3  # of one run within a day; then it is left alone
LEAVING_SECONDS = 60.0  # expected from being told to leave to being gone
NOBODY = 0  # the team of runs that belong to no team


@dataclass(frozen=True)
class Card:
    """A device. `kept_for`: a run for which another was stopped here; `taken`: bytes that programs
    hold which are no runs.
    """

    id: int
    memory: int
    usable: bool = True
    kept_for: int | None = None
    taken: int = 0

    @property
    def room(self) -> int:
        """What runs can have of it now."""
        return max(0, self.memory - self.taken)


@dataclass(frozen=True)
class Holding:
    """A run on a device. `memory` None: it has the device alone. `ends`: expected, infinity where
    nobody knows.
    """

    run: int
    card: int
    team: int
    user: int
    started: float
    memory: int | None = None
    priority: str = "normal"
    ends: float = math.inf
    leaving: bool = False  # told to save and go
    spared: bool = False  # stopped for others often enough today


@dataclass(frozen=True)
class Request:
    """A waiting run. `memory` None: nobody has forecast it, so it gets a device of its own."""

    run: int
    team: int
    user: int
    submitted: float
    memory: int | None = None
    priority: str = "normal"
    seconds: float = math.inf
    moved_up: float = 0.0  # when its owner moved it to the front of their own runs
    due: bool = True  # not before its pause after a crash is over

    @property
    def rank(self) -> tuple[int, float, float, int]:
        """Its place among its owner's runs."""
        return (CLASSES.index(self.priority), -self.moved_up, self.submitted, self.run)


@dataclass(frozen=True)
class Share:
    """A team's part of the pool. `limit` None: the whole pool. `seconds_left` None: no budget, or a
    soft one.
    """

    name: str = "no team"
    guaranteed: int = 0
    limit: int | None = None
    weight: float = 1.0
    seconds_left: float | None = None
    most_memory: int | None = None
    held: bool = False


@dataclass(frozen=True)
class Person:
    """`used`: device-seconds of late, decayed with a half-life of a week; who used less comes
    first.
    """

    running: int | None = None
    elsewhere: int = 0  # devices that they hold in other pools
    seconds_left: float | None = None
    used: float = 0.0


@dataclass(frozen=True)
class Scene:
    pool: str
    cards: Sequence[Card]
    holdings: Sequence[Holding] = ()
    waiting: Sequence[Request] = ()
    teams: Mapping[int, Share] = field(default_factory=dict)
    people: Mapping[int, Person] = field(default_factory=dict)
    most_a_card: int = 1  # runs that may share a device
    shortest: float = 600.0  # seconds that a run is left alone after each start
    held: bool = False
    now: float = 0.0

    def share(self, team: int) -> Share:
        return self.teams.get(team, Share())

    def person(self, user: int) -> Person:
        return self.people.get(user, Person())


@dataclass(frozen=True)
class Barrier:
    """Why a run does not start now: a word for the program, and the numbers for a sentence
    (explain.py).
    """

    why: str
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass
class Decision:
    starts: list[Holding] = field(default_factory=list)
    evictions: dict[int, int] = field(default_factory=dict)  # victim -> the run for which it goes
    given_up: list[int] = field(default_factory=list)  # runs for which a device is kept no more
    # Of the runs that were looked at and did not start
    barriers: dict[int, Barrier] = field(default_factory=dict)
