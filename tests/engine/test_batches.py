import random

from training.engine.batches import epoch_batches, fill, plan_steps
from training.engine.config import RunConfig

LENGTHS = [random.Random(3).randint(5, 60) for _ in range(1000)]


def test_every_row_once_and_no_batch_over_its_budget_with_padding_counted():
    batches = epoch_batches(LENGTHS, budget=256, seed="0:0")
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    assert all(len(batch) * max(LENGTHS[row] for row in batch) <= 256 for batch in batches)


def test_neighbours_in_length_leave_little_padding():
    batches = epoch_batches(LENGTHS, budget=512, seed="0:0")
    places = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert sum(LENGTHS) / places > 0.9


def test_the_same_seed_gives_the_same_plan_and_another_epoch_another_one():
    assert epoch_batches(LENGTHS, budget=256, seed="7:0") == epoch_batches(LENGTHS, budget=256, seed="7:0")
    assert epoch_batches(LENGTHS, budget=256, seed="7:0") != epoch_batches(LENGTHS, budget=256, seed="7:1")


def test_most_steps_ends_the_plan_and_goes_through_the_data_again_if_need_be():
    config = RunConfig(max_steps=7, tokens_per_batch=64, max_length=64, epochs=1)
    plan = plan_steps([32] * 6, config)
    assert plan.total_steps == 7
    assert plan.epochs == 3


def test_accumulation_does_not_reach_over_an_epochs_edge():
    config = RunConfig(epochs=2, accumulation=2, tokens_per_batch=64, max_length=64)
    plan = plan_steps([64] * 3, config)
    assert [len(step) for step in plan.steps] == [2, 1, 2, 1]


def test_a_row_longer_than_the_budget_stands_alone():
    assert fill([0, 1], [10, 100], budget=50) == [[0], [1]]
