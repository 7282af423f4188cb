import random

from training.engine.batches import batch_sequences, build_epoch_batches, plan_steps
from training.engine.config import RunConfig


def make_config(budget, **settings):
    return RunConfig(**{"max_tokens_per_batch": budget, "max_length": 60, **settings})


def list_rows(batches):
    return [[row for (row,) in batch] for batch in batches]


RNG = random.Random(3)
LENGTHS = [RNG.randint(5, 60) for _ in range(1000)]


def test_every_row_once_and_no_batch_over_its_budget_with_padding_counted():
    batches = list_rows(build_epoch_batches(LENGTHS, make_config(256), 0))
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    assert all(len(batch) * max(LENGTHS[row] for row in batch) <= 256 for batch in batches)


def test_neighbours_in_length_leave_little_padding():
    batches = list_rows(build_epoch_batches(LENGTHS, make_config(512), 0))
    padded_tokens = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert sum(LENGTHS) / padded_tokens > 0.9


def test_the_same_seed_gives_the_same_plan_and_another_epoch_another_one():
    assert build_epoch_batches(LENGTHS, make_config(256), 0) == build_epoch_batches(
        LENGTHS, make_config(256), 0
    )
    assert build_epoch_batches(LENGTHS, make_config(256), 0) != build_epoch_batches(
        LENGTHS, make_config(256), 1
    )
    assert build_epoch_batches(LENGTHS, make_config(256), 0) != build_epoch_batches(
        LENGTHS, make_config(256, seed=1), 0
    )


def test_most_steps_ends_the_plan_and_goes_through_the_data_again_if_need_be():
    config = RunConfig(max_steps=7, max_tokens_per_batch=64, max_length=64, epochs=1)
    plan = plan_steps([32] * 6, config)
    assert plan.total_steps == 7
    assert plan.epochs == 3


def test_accumulation_does_not_reach_over_an_epochs_edge():
    config = RunConfig(
        epochs=2, gradient_accumulation_steps=2, max_tokens_per_batch=64, max_length=64
    )
    plan = plan_steps([64] * 3, config)
    assert [len(step) for step in plan.steps] == [2, 1, 2, 1]


def test_a_row_longer_than_the_budget_stands_alone():
    assert batch_sequences([(10, (0,)), (100, (1,))], make_config(60)) == [[(0,)], [(1,)]]


def test_batches_may_be_counted_in_rows():
    batches = build_epoch_batches(
        LENGTHS, make_config(60, batch_unit="rows", per_device_train_batch_size=4), 0
    )
    assert {len(batch) for batch in batches} == {4}


def test_packed_sequences_hold_every_row_once_and_are_nearly_full():
    batches = build_epoch_batches(LENGTHS, make_config(512, packing=True, max_length=128), 0)
    sequences = [packed for batch in batches for packed in batch]
    assert sorted(row for packed in sequences for row in packed) == list(range(1000))
    assert all(sum(LENGTHS[row] for row in packed) <= 128 for packed in sequences)
    assert sum(LENGTHS) / (128 * len(sequences)) > 0.95


def test_parts_of_a_batch_leave_every_row_in_its_step():
    unsplit = plan_steps(LENGTHS, make_config(512, gradient_accumulation_steps=2))
    split = plan_steps(
        LENGTHS, make_config(512, gradient_accumulation_steps=2, micro_batch_splits=3)
    )
    assert len(split.steps) == len(unsplit.steps)
    for one, other in zip(unsplit.steps, split.steps, strict=True):
        assert [row for batch in one for row in batch] == [row for batch in other for row in batch]
        assert max(len(batch) for batch in other) <= -(-max(len(batch) for batch in one) // 3)
