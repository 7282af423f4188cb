import pytest

from tests.user_errors import assert_mentions, raises_user_error
from training.engine.config import RunConfig
from training.errors import ConfigError


def test_the_default_settings_are_valid():
    config = RunConfig()
    assert config.rank == 16
    assert RunConfig.from_dict(config.to_dict()) == config


def test_an_unknown_setting_is_named():
    with raises_user_error(ConfigError, field="lerning_rate", naming=("lerning_rate", "rank")):
        RunConfig.from_dict({"lerning_rate": 1})


@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("rank", "16", ("'16'", "whole number")),
        ("rank", True, ("True", "whole number")),
        ("rank", 0, ("rank is 0", "1 and 1024")),
        ("learning_rate", float("nan"), ("nan", "1e-08 and 1")),
        ("lr_scheduler_type", "step", ("'step'", "cosine", "linear", "constant_with_warmup")),
        ("train_on_prompt", 1, ("true or false",)),
    ],
)
def test_an_invalid_value_is_rejected_with_its_field(name, value, facts):
    with raises_user_error(ConfigError, field=name, naming=(name, *facts)):
        RunConfig.from_dict({name: value})


def test_a_contradiction_is_rejected_with_both_values():
    facts = ("max_tokens_per_batch is 100", "max_length = 512")
    with raises_user_error(ConfigError, field="max_tokens_per_batch", naming=facts):
        RunConfig(max_tokens_per_batch=100)


def test_the_learning_rate_warms_up_then_decays_to_almost_zero():
    config = RunConfig(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type="cosine")
    rates = [config.learning_rate_at(step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_constant_learning_rate_does_not_change():
    config = RunConfig(
        learning_rate=0.5, warmup_ratio=0.0, lr_scheduler_type="constant_with_warmup"
    )
    assert {config.learning_rate_at(step, 10) for step in range(1, 11)} == {0.5}


@pytest.mark.parametrize(
    ("values", "field", "facts"),
    [
        ({"target_modules": "a" * 501}, "target_modules", ("all-linear",)),
        ({"target_modules": "q\0"}, "target_modules", ("NUL",)),
        ({"seed": 10**30}, "seed", ("digits",)),
        (
            {"early_stopping_patience": 5, "eval_steps": 100, "max_steps": 200},
            "early_stopping_patience",
            ("is 5", "eval_steps = 100", "step 500", "max_steps is 200"),
        ),
        ({"batch_unit": "bytes"}, "batch_unit", ("'bytes'", "tokens", "rows")),
    ],
)
def test_malformed_and_contradictory_settings_are_rejected(values, field, facts):
    with raises_user_error(ConfigError, field=field, naming=facts):
        RunConfig.from_dict(values)


def test_unlikely_settings_give_warnings():
    assert RunConfig().list_warnings() == []
    assert_mentions(
        RunConfig(learning_rate=0.01).list_warnings()[0], "learning_rate is 0.01", 0.005, 0.001
    )
    assert_mentions(RunConfig(rank=4, alpha=32).list_warnings()[0], "alpha is 32", "rank 4", "by 8")


def test_without_warmup_the_first_step_has_the_full_rate():
    """As in transformers. If the first step of 60 is skipped, the held-out loss ends 1% higher."""
    config = RunConfig(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="linear")
    rates = [config.learning_rate_at(step, 60) for step in range(1, 61)]
    assert rates[0] == 1.0
    assert sum(rates) == pytest.approx(30.5)
    assert rates[-1] == pytest.approx(1 / 60)
