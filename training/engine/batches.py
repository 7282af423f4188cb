"""Groups rows into batches and steps: a pure function of lengths, settings and seed.

Because it is pure, a checkpoint stores only the step number and no position in the data, and the
site can count the steps of a run before it starts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from training.engine.config import RunConfig

# Row indices that share one sequence; a single index without packing
PackedRows = tuple[int, ...]
Batch = list[PackedRows]

# Rows are sorted by length within windows of this many shuffled rows (25 batches of 16). That is
# enough to leave little padding (1.3% on smart_home at 1,024 tokens, 20.8% unsorted), and few
# enough that an epoch does not run from short rows to long ones.
WINDOW_ROWS = 400


@dataclass(frozen=True)
class BatchPlan:
    """The batches of every optimizer step: `steps[i]` belongs to step i + 1."""

    steps: list[list[Batch]]
    epochs: int

    @property
    def total_steps(self) -> int:
        return len(self.steps)


def plan_steps(lengths: Sequence[int], config: RunConfig) -> BatchPlan:
    """Group the rows of each epoch into batches, and `gradient_accumulation_steps` batches into
    each step.

    The last step of an epoch may have fewer batches; no step spans two epochs.
    `micro_batch_splits` splits each batch without moving rows between steps, so a run can resume
    from any checkpoint with more splits.
    """
    steps: list[list[Batch]] = []
    epoch = 0
    while epoch < config.epochs if not config.max_steps else len(steps) < config.max_steps:
        batches = build_epoch_batches(lengths, config, epoch)
        steps += [
            [
                part
                for batch in batches[i : i + config.gradient_accumulation_steps]
                for part in split_batch(batch, config.micro_batch_splits)
            ]
            for i in range(0, len(batches), config.gradient_accumulation_steps)
        ]
        epoch += 1
    return BatchPlan(steps[: config.max_steps or None], epoch)


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into at most `count` parts of nearly equal size, each with at least one
    sequence.
    """
    size = -(-len(batch) // count)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def build_epoch_batches(lengths: Sequence[int], config: RunConfig, epoch: int) -> list[Batch]:
    """Build the batches of one epoch: every row once, each batch within the limit with padding
    counted, in an order drawn from the seed.
    """
    rng = random.Random(f"{config.seed}:{epoch}")
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    batches: list[Batch] = []
    for start in range(0, len(rows), WINDOW_ROWS):
        window = rows[start : start + WINDOW_ROWS]
        sequences = (
            pack_rows(window, lengths, config.max_length)
            if config.packing
            else [(row,) for row in window]
        )
        sized_sequences = [(get_sequence_length(packed, lengths), packed) for packed in sequences]
        batches += batch_sequences(sorted(sized_sequences, key=itemgetter(0)), config)
    rng.shuffle(batches)
    return batches


def get_sequence_length(packed: PackedRows, lengths: Sequence[int]) -> int:
    return sum([lengths[row] for row in packed]) if len(packed) > 1 else lengths[packed[0]]


def pack_rows(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[PackedRows]:
    """Pack rows into sequences of at most `max_tokens` tokens, by first-fit decreasing: longest
    row first, each into the first sequence with enough free tokens.
    """
    sequences: list[list[int]] = []
    free_tokens: list[int] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        index = next((i for i, left in enumerate(free_tokens) if left >= lengths[row]), None)
        if index is None:
            sequences.append([row])
            free_tokens.append(max_tokens - lengths[row])
        else:
            sequences[index].append(row)
            free_tokens[index] -= lengths[row]
    return [tuple(sequence) for sequence in sequences]


def batch_sequences(sequences: Iterable[tuple[int, PackedRows]], config: RunConfig) -> list[Batch]:
    """Group (length, sequence) pairs, shortest first, into as few batches as the limit allows. A
    sequence longer than the limit gets a batch of its own.
    """
    is_counted_in_rows = config.batch_unit == "rows"
    limit = (
        config.per_device_train_batch_size if is_counted_in_rows else config.max_tokens_per_batch
    )
    batches: list[Batch] = []
    for length, packed in sequences:
        count = len(batches[-1]) + 1 if batches else 0
        if batches and (count if is_counted_in_rows else length * count) <= limit:
            batches[-1].append(packed)
        else:
            batches.append([packed])
    return batches
