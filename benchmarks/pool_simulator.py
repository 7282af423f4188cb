"""A pool of made-up devices ("4 x 24 GB") with a clock of its own, under the true scheduler: to
test it, and to try a policy out.

It never stands in for a real device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import MOST_EVICTIONS, Card, Decision, Holding, Request, Scene

GRACE = 30.0  # seconds from being told to leave to being gone
DAY = 86_400.0


@dataclass
class Interval:
    run: int
    card: int
    team: int
    started: float
    ended: float = math.inf


@dataclass
class Job:
    """A run: `left` seconds of work, of which the scheduler knows only what the request says."""

    request: Request
    left: float
    evicted_at: list[float] = field(default_factory=list)


class SimulatedPool:
    def __init__(self, scene: Scene, now: float = 0.0) -> None:
        self.scene = replace(scene, holdings=(), waiting=())
        self.cards = {card.id: card for card in scene.cards}
        self.now = now
        self.waiting: dict[int, Job] = {}
        self.running: dict[int, tuple[Job, Holding]] = {}
        self.leaving: dict[int, float] = {}  # run -> when it is gone
        self.ledger: list[Interval] = []
        self.finished: dict[int, float] = {}

    @classmethod
    def of(cls, count: int, memory: int, **choices: object) -> SimulatedPool:
        """`SimulatedPool.of(4, 24_000_000_000)`."""
        cards = [Card(number, memory) for number in range(count)]
        return cls(Scene("simulated", cards, **choices))  # type: ignore[arg-type]

    def submit(self, request: Request, seconds: float) -> None:
        self.waiting[request.run] = Job(replace(request, submitted=self.now), seconds)
        self.look()

    def look(self) -> Decision:
        """One admission pass, and what follows from it."""
        made = Scheduler(self.seen()).admit(self.now)
        for held in made.starts:
            job = self.waiting.pop(held.run)
            self.running[held.run] = (job, held)
            self.ledger.append(Interval(held.run, held.card, held.team, self.now))
            if self.cards[held.card].kept_for == held.run:
                self.cards[held.card] = replace(self.cards[held.card], kept_for=None)
        for run in made.given_up:
            self.forget(run)
        for victim, preemptor in made.evictions.items():
            job, held = self.running[victim]
            job.evicted_at.append(self.now)
            self.leaving[victim] = self.now + GRACE
            self.cards[held.card] = replace(self.cards[held.card], kept_for=preemptor)
        return made

    def seen(self) -> Scene:
        return replace(
            self.scene,
            cards=list(self.cards.values()),
            holdings=[
                replace(
                    held,
                    leaving=run in self.leaving,
                    ends=self.leaving.get(run, held.ends),
                    spared=sum(at > self.now - DAY for at in job.evicted_at) >= MOST_EVICTIONS,
                )
                for run, (job, held) in self.running.items()
            ],
            waiting=[job.request for job in self.waiting.values()],
        )

    def run_until(self, until: float) -> None:
        """Move the clock from one end to the next; a pass after each."""
        while True:
            ends = {
                run: min(held.started + job.left, self.leaving.get(run, math.inf))
                for run, (job, held) in self.running.items()
            }
            first = min(ends, key=lambda run: (ends[run], run), default=None)
            if first is None or ends[first] > until:
                self.now = max(self.now, until)
                self.look()
                return
            self.now = max(self.now, ends[first])
            self.end(first)

    def end(self, run: int, *, crashed: bool = False) -> None:
        """It ends at this moment: done, gone for another, or crashed and waiting again."""
        job, held = self.running.pop(run)
        next(
            line for line in self.ledger if line.run == run and line.ended == math.inf
        ).ended = self.now
        job.left -= self.now - held.started
        evicted = self.leaving.pop(run, None) is not None
        if job.left > 1e-9 and (evicted or crashed):
            self.waiting[run] = job
        else:
            self.finished[run] = self.now
        self.look()

    def withdraw(self, run: int) -> None:
        """A waiting run is cancelled; what was kept for it is free."""
        self.waiting.pop(run)
        self.forget(run)
        self.look()

    def forget(self, run: int) -> None:
        """Keep no device for a run any more."""
        self.cards = {
            number: replace(card, kept_for=None) if card.kept_for == run else card
            for number, card in self.cards.items()
        }
