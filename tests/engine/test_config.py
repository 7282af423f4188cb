import pytest

from training.engine.config import RunConfig
from training.errors import ConfigError


def test_defaults_fit_together():
    config = RunConfig()
    assert config.rank == 16
    assert RunConfig.from_dict(config.to_dict()) == config


def test_an_unknown_setting_is_named():
    with pytest.raises(ConfigError, match="no setting lerning_rate") as caught:
        RunConfig.from_dict({"lerning_rate": 1})
    assert caught.value.field == "lerning_rate"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", "16", "must be of type int"),
        ("rank", True, "must be of type int"),
        ("rank", 0, "from 1 to 1024"),
        ("learning_rate", float("nan"), "from 1e-08 to 1"),
        ("lr_scheduler_type", "step", "one of cosine, linear, constant_with_warmup"),
        ("train_on_prompt", 1, "must be of type bool"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_dict({name: value})
    assert caught.value.field == name


def test_a_contradiction_is_refused_with_both_values():
    with pytest.raises(ConfigError, match=r"max_tokens_per_batch is 100.*max_length = 512"):
        RunConfig(max_tokens_per_batch=100)


def test_the_learning_rate_warms_up_then_falls_to_almost_zero():
    config = RunConfig(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type="cosine")
    rates = [config.learning_rate_at(step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_constant_rate_stays():
    config = RunConfig(
        learning_rate=0.5, warmup_ratio=0.0, lr_scheduler_type="constant_with_warmup"
    )
    assert {config.learning_rate_at(step, 10) for step in range(1, 11)} == {0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": "a" * 501}, "target_modules must be"),
        ({"target_modules": "q\0"}, "target_modules has a NUL"),
        ({"seed": 10**30}, "seed has too many digits"),
        (
            {"early_stopping_patience": 5, "eval_steps": 100, "max_steps": 200},
            "early_stopping_patience is 5 with eval_steps = 100",
        ),
        ({"batch_unit": "bytes"}, "batch_unit is 'bytes'"),
    ],
)
def test_more_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_what_is_only_unwise_is_a_warning():
    assert RunConfig().list_warnings() == []
    assert "above 0.005" in RunConfig(learning_rate=0.01).list_warnings()[0]
    assert "8-fold" in RunConfig(rank=4, alpha=32).list_warnings()[0]


def test_without_warm_up_the_first_step_has_the_full_rate():
    """As transformers has it: a step too little at 60 steps leaves the held-out loss a percent
    higher.
    """
    config = RunConfig(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="linear")
    rates = [config.learning_rate_at(step, 60) for step in range(1, 61)]
    assert rates[0] == 1.0
    assert sum(rates) == pytest.approx(30.5)
    assert rates[-1] == pytest.approx(1 / 60)
