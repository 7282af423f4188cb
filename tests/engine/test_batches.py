import random

from training.engine.batches import batch_sequences, build_epoch_batches, plan_steps
from training.engine.config import RunConfig


def make_config(budget, **settings):
    return RunConfig(**{"max_tokens_per_batch": budget, "max_length": 60, **settings})


def list_rows(batches):
    return [[row for (row,) in batch] for batch in batches]


RNG = random.Random(3)
LENGTHS = [RNG.randint(5, 60) for _ in range(1000)]


def test_batches_hold_every_row_once_within_the_token_budget_including_padding():
    batches = list_rows(build_epoch_batches(LENGTHS, make_config(256), 0))
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    assert all(len(batch) * max(LENGTHS[row] for row in batch) <= 256 for batch in batches)


def test_sorting_by_length_leaves_little_padding():
    batches = list_rows(build_epoch_batches(LENGTHS, make_config(512), 0))
    padded_tokens = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert sum(LENGTHS) / padded_tokens > 0.9


def test_batches_depend_on_seed_and_epoch_only():
    assert build_epoch_batches(LENGTHS, make_config(256), 0) == build_epoch_batches(
        LENGTHS, make_config(256), 0
    )
    assert build_epoch_batches(LENGTHS, make_config(256), 0) != build_epoch_batches(
        LENGTHS, make_config(256), 1
    )
    assert build_epoch_batches(LENGTHS, make_config(256), 0) != build_epoch_batches(
        LENGTHS, make_config(256, seed=1), 0
    )


def test_max_steps_limits_the_plan_and_repeats_the_data_if_needed():
    config = RunConfig(max_steps=7, max_tokens_per_batch=64, max_length=64, epochs=1)
    plan = plan_steps([32] * 6, config)
    assert plan.total_steps == 7
    assert plan.epochs == 3


def test_gradient_accumulation_does_not_cross_epochs():
    config = RunConfig(
        epochs=2, gradient_accumulation_steps=2, max_tokens_per_batch=64, max_length=64
    )
    plan = plan_steps([64] * 3, config)
    assert [len(step) for step in plan.steps] == [2, 1, 2, 1]


def test_a_row_longer_than_the_budget_gets_its_own_batch():
    assert batch_sequences([(10, (0,)), (100, (1,))], make_config(60)) == [[(0,)], [(1,)]]


def test_batches_can_be_measured_in_rows():
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


def test_splitting_batches_keeps_every_row_in_its_step():
    unsplit = plan_steps(LENGTHS, make_config(512, gradient_accumulation_steps=2))
    split = plan_steps(
        LENGTHS, make_config(512, gradient_accumulation_steps=2, micro_batch_splits=3)
    )
    assert len(split.steps) == len(unsplit.steps)
    for one, other in zip(unsplit.steps, split.steps, strict=True):
        assert [row for batch in one for row in batch] == [row for batch in other for row in batch]
        assert max(len(batch) for batch in other) <= -(-max(len(batch) for batch in one) // 3)
