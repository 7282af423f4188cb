"""Which rows go through the model together, and in what order: a pure function of lengths, budget and seed.

Because it is pure, a checkpoint need not store where the data stood: the step number says it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.engine.config import RunConfig

Batch = list[int]  # row numbers

# Rows are sorted by length only among this many shuffled neighbours (25 batches of 16): enough to leave hardly any padding
# (1.3 % on smart_home at 1,024 tokens, 20.8 % unsorted), few enough that an epoch is not a walk from short to long.
WINDOW_ROWS = 400


@dataclass(frozen=True)
class Plan:
    """The batches of every optimizer step: `steps[i]` belongs to step i + 1."""

    steps: list[list[Batch]]
    epochs: int

    @property
    def total_steps(self) -> int:
        return len(self.steps)


def plan_steps(lengths: Sequence[int], config: RunConfig) -> Plan:
    """Group the rows of each epoch into batches, and batches into steps of `accumulation` batches.

    An epoch's last step may hold fewer batches; no step reaches over an epoch's edge.
    """
    steps: list[list[Batch]] = []
    epoch = 0
    while epoch < config.epochs if not config.max_steps else len(steps) < config.max_steps:
        batches = epoch_batches(lengths, budget=config.tokens_per_batch, seed=f"{config.seed}:{epoch}")
        steps += [batches[i : i + config.accumulation] for i in range(0, len(batches), config.accumulation)]
        epoch += 1
    return Plan(steps[: config.max_steps or None], epoch)


def epoch_batches(lengths: Sequence[int], *, budget: int, seed: str) -> list[Batch]:
    """All rows once, in batches of at most `budget` tokens with padding counted, in an order drawn from `seed`."""
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    batches: list[Batch] = []
    for at in range(0, len(rows), WINDOW_ROWS):
        window = sorted(rows[at : at + WINDOW_ROWS], key=lambda row: lengths[row])
        batches += fill(window, lengths, budget)
    draw.shuffle(batches)
    return batches


def fill(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[Batch]:
    """Rows, shortest first, into as few batches as fit the budget. A row longer than the budget gets one of its own."""
    batches: list[Batch] = []
    for row in rows:
        if batches and lengths[row] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
