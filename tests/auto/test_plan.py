"""Auto LLM's plan: the method that fits, a reason and an alternative for each choice, and locks."""

import json

import numpy as np
import pytest

from tests.user_errors import assert_mentions, raises_user_error
from training.auto.plan import NOTHING_FITS, make_plan
from training.auto.plan_types import GOALS, PlanInputs
from training.engine.config import RunConfig
from training.errors import ConfigError, UserError

GB = 10**9
WEIGHTS = {"lora": 14 * GB, "qlora": 4 * GB, "full": 80 * GB, "prompt": 14 * GB}


def forecast_memory(config):
    """A rough 7B model: weights, and activations proportional to tokens."""
    activations = config.max_tokens_per_batch * (
        200_000 if config.gradient_checkpointing else 2_000_000
    )
    return {
        "peak": WEIGHTS[config.method] + activations,
        "precision": "bf16",
        "optimizer": "adamw_torch",
        "trainable": 1,
    }


def make_inputs(free_bytes, lengths=None, **more):
    lengths = np.asarray(
        lengths if lengths is not None else [100] * 990 + [300] * 10, dtype=np.int32
    )
    defaults = {
        "model": "some-7b",
        "hidden_size": 4096,
        "context_length": 4096,
        "parameters_per_rank": 2_500_000,
        "rows": len(lengths),
        "eval_rows": 100,
        "lengths": lengths,
        "trained_lengths": lengths // 2,
        "device": "a GPU",
        "total_bytes": 80 * GB,
        "free_bytes": free_bytes,
        "forecast_memory": forecast_memory,
        "count_steps": lambda config: 190,
    }
    return PlanInputs(**{**defaults, **more})


def find_choice(plan, name):
    return next(one for one in plan.choices if one.setting == name)


def test_a_plan_has_a_reason_an_alternative_and_a_source_for_every_setting():
    plan = make_plan(make_inputs(24 * GB))
    config = RunConfig.from_dict(plan.settings)
    assert (config.method, config.rank, config.alpha, config.target_modules) == (
        "lora",
        16,
        32,
        "all-linear",
    )
    assert config.learning_rate == 2e-4
    assert config.max_length == 128  # The 1% of longer rows are truncated
    assert not config.gradient_checkpointing
    assert all(one.why and one.alternative and one.source for one in plan.choices)
    assert_mentions(find_choice(plan, "method").alternative, "QLoRA", "7.3 GB")
    json.dumps(plan.to_json())


def test_short_memory_selects_qlora_and_says_what_lora_would_need():
    plan = make_plan(make_inputs(10 * GB))
    assert plan.settings["method"] == "qlora"
    assert_mentions(find_choice(plan, "method").why, "14.0 GB", "10.0 GB", "QLoRA")


def test_smaller_batches_and_then_checkpointing_are_tried_before_another_method():
    wide = make_inputs(24 * GB, lengths=[1000] * 1000, rows=1000)
    assert make_plan(wide).settings["gradient_accumulation_steps"] > 1
    assert make_plan(wide).settings["method"] == "lora"
    tight = make_inputs(16 * GB, lengths=[1000] * 1000)
    plan = make_plan(tight)
    assert plan.settings["method"] == "lora" and plan.settings["gradient_checkpointing"]
    assert_mentions(find_choice(plan, "gradient_checkpointing").why, "1,024 tokens", "16.0 GB")


def test_gradient_accumulation_keeps_the_rows_of_a_step():
    unsplit, halved = (
        make_plan(make_inputs(200 * GB, lengths=[1000] * 1000)),
        make_plan(make_inputs(20 * GB, lengths=[1000] * 1000)),
    )
    one, other = (
        plan.settings["max_tokens_per_batch"] * plan.settings["gradient_accumulation_steps"]
        for plan in (unsplit, halved)
    )
    assert halved.settings["gradient_accumulation_steps"] > 1
    assert other == pytest.approx(one, rel=0.1)


def test_if_nothing_fits_the_error_names_the_closest_option():
    long = {"lengths": [4000] * 1000}
    facts = ("QLoRA with gradient checkpointing", "4,032 tokens", "4.8 GB", "4.5 GB", "100%")
    with raises_user_error(code=NOTHING_FITS, field="max_length", naming=facts):
        make_plan(make_inputs(4.5 * GB, **long))
    with raises_user_error(code=NOTHING_FITS, field="model", naming=("a GPU",)):
        make_plan(make_inputs(2 * GB))


@pytest.mark.parametrize("goal", GOALS)
def test_the_goal_sets_the_rank(goal):
    assert make_plan(make_inputs(40 * GB), goal=goal).settings["rank"] == GOALS[goal][0]


def test_more_data_raises_the_rank():
    plan = make_plan(make_inputs(40 * GB, rows=2_000_000))
    assert plan.settings["rank"] == 32
    assert_mentions(find_choice(plan, "rank").why, "102,000,000")
    assert make_plan(make_inputs(40 * GB, lengths=[100] * 50)).settings["rank"] == 8


def test_locked_settings_are_kept_and_the_others_adapt():
    plan = make_plan(make_inputs(24 * GB), locked={"rank": 64})
    assert plan.settings["rank"] == 64 and plan.settings["alpha"] == 128
    assert find_choice(plan, "rank").locked
    assert_mentions(find_choice(plan, "rank").alternative, 16)
    assert make_plan(make_inputs(24 * GB), locked={"method": "qlora"}).settings["method"] == "qlora"
    assert (
        make_plan(make_inputs(24 * GB), locked={"gradient_checkpointing": True}).settings[
            "gradient_checkpointing"
        ]
        is True
    )
    assert (
        make_plan(make_inputs(24 * GB), locked={"max_tokens_per_batch": 256}).settings[
            "max_tokens_per_batch"
        ]
        == 256
    )


def test_other_methods_are_used_only_if_locked():
    plan = make_plan(make_inputs(24 * GB), locked={"method": "prompt"})
    assert "rank" not in plan.settings
    assert plan.settings["learning_rate"] == RunConfig.from_dict({"method": "prompt"}).learning_rate
    full = make_plan(make_inputs(100 * GB), locked={"method": "full"})
    assert full.settings["learning_rate"] == 1e-5


def test_narrow_models_and_short_runs_get_a_higher_learning_rate():
    assert make_plan(make_inputs(24 * GB, hidden_size=576)).settings[
        "learning_rate"
    ] == pytest.approx(9.1e-4)
    assert (
        make_plan(make_inputs(24 * GB, hidden_size=576, count_steps=lambda config: 50)).settings[
            "learning_rate"
        ]
        > 1e-3
    )


@pytest.mark.parametrize(
    ("locked", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "many"}, "rank"),
        ({"nonsense": 1}, "nonsense"),
        ({"method": "magic"}, "method"),
    ],
)
def test_an_invalid_lock_is_rejected_and_named(locked, field):
    with pytest.raises(ConfigError) as caught:
        make_plan(make_inputs(24 * GB), locked=locked)
    assert caught.value.field == field


def test_a_lock_on_a_setting_that_no_plan_chooses_is_rejected():
    with raises_user_error(field="seed"):
        make_plan(make_inputs(24 * GB), locked={"seed": 3})
    with raises_user_error(ConfigError, field="rank", naming=("Prompt tuning",)):
        make_plan(make_inputs(24 * GB), locked={"method": "prompt", "rank": 8})


def test_a_method_that_does_not_work_with_the_model_is_skipped():
    def no_qlora(config):
        if config.method == "qlora":
            raise UserError("QLoRA does not fit this model.", field="method")
        return forecast_memory(config)

    plan = make_plan(make_inputs(24 * GB, forecast_memory=no_qlora))
    assert_mentions(find_choice(plan, "method").alternative, "QLoRA")


def test_if_no_method_can_be_forecast_the_error_says_why():
    def fail_always(config):
        raise UserError("This model cannot be forecast.", field="model", code="no_forecast")

    with raises_user_error(field="model", code="no_forecast"):
        make_plan(make_inputs(24 * GB, forecast_memory=fail_always))


def test_locked_gradient_accumulation_divides_the_step():
    plan = make_plan(make_inputs(24 * GB), locked={"gradient_accumulation_steps": 4})
    free = make_plan(make_inputs(24 * GB)).settings
    assert plan.settings["max_tokens_per_batch"] * 4 == pytest.approx(
        free["max_tokens_per_batch"], rel=0.1
    )


def test_trials_vary_only_unlocked_settings():
    plan = make_plan(make_inputs(24 * GB), locked={"rank": 8, "tuning_budget_fraction": 0.3})
    assert plan.settings["tuning_search_space"] == "learning_rate,alpha,target_modules"
    assert (
        make_plan(
            make_inputs(24 * GB),
            locked={"tuning_budget_fraction": 0.3, "tuning_search_space": "learning_rate"},
        ).settings["tuning_search_space"]
        == "learning_rate"
    )
    locked = {
        "rank": 8,
        "alpha": 16,
        "target_modules": "all-linear",
        "learning_rate": 1e-4,
        "tuning_budget_fraction": 0.3,
    }
    with raises_user_error(field="tuning_budget_fraction"):
        make_plan(make_inputs(24 * GB), locked=locked)


def test_a_locked_eval_interval_does_not_contradict_early_stopping():
    plan = make_plan(
        make_inputs(24 * GB, count_steps=lambda config: 60),
        locked={"max_steps": 60, "eval_steps": 20},
    )
    assert plan.settings["early_stopping_patience"] == 0


@pytest.mark.parametrize("length", [8, 10, 15, 16, 17])
def test_the_search_for_a_smaller_batch_ends_with_very_short_rows(length):
    with raises_user_error(code=NOTHING_FITS):
        make_plan(make_inputs(10**6), locked={"max_length": length})


def test_locked_full_fine_tuning_uses_fewer_bits_before_it_fails():
    def by_bits(config):
        weights = {"bf16": 40}.get(config.precision, 80) - {"adamw_8bit": 10}.get(config.optim, 0)
        return forecast_memory(config) | {
            "peak": weights * GB,
            "optimizer": "adamw_8bit" if "8" in config.optim else "adamw_torch",
        }

    tight = make_plan(make_inputs(75 * GB, forecast_memory=by_bits), locked={"method": "full"})
    assert tight.settings["optim"] == "adamw_8bit" and tight.settings["precision"] == "auto"
    assert_mentions(find_choice(tight, "optim").why, "32-bit", "80.0 GB", "75.0 GB")
    tighter = make_plan(make_inputs(40 * GB, forecast_memory=by_bits), locked={"method": "full"})
    assert tighter.settings["precision"] == "bf16"
    assert_mentions(find_choice(tighter, "precision").why, "70.0 GB", "40.0 GB")
    with raises_user_error(code=NOTHING_FITS):
        make_plan(
            make_inputs(40 * GB, forecast_memory=by_bits),
            locked={"method": "full", "precision": "auto"},
        )


def test_a_model_without_adaptable_layers_gets_prompt_tuning_with_the_reason():
    def no_layers(config):
        if config.method != "prompt":
            raise UserError("target_modules 'all-linear' does not fit this model.", field="method")
        return forecast_memory(config)

    plan = make_plan(make_inputs(24 * GB, forecast_memory=no_layers))
    assert plan.settings["method"] == "prompt" and "rank" not in plan.settings
    assert_mentions(find_choice(plan, "method").alternative, "LoRA", "target_modules")
    with raises_user_error(field="method", naming=("target_modules",)):
        make_plan(make_inputs(24 * GB, forecast_memory=no_layers), locked={"rank": 8})


def test_the_memory_margin_is_mentioned_where_it_decides():
    def close(config):
        return forecast_memory(config) | {"peak": 15 * GB if config.method == "lora" else 4 * GB}

    why = find_choice(make_plan(make_inputs(int(15.5 * GB), forecast_memory=close)), "method").why
    assert_mentions(why, "15.0 GB", "15.5 GB", "5%")


def test_prompt_tuning_is_not_used_if_lora_is_only_too_large():
    def no_qlora(config):
        if config.method == "qlora":
            raise UserError("This model cannot be forecast.", field="model", code="no_forecast")
        return forecast_memory(config) | ({"peak": 1} if config.method == "prompt" else {})

    with raises_user_error(code=NOTHING_FITS):
        make_plan(make_inputs(10 * GB, forecast_memory=no_qlora))


def test_prompt_tuning_is_not_used_if_rows_fill_the_context():
    def no_layers(config):
        if config.method != "prompt":
            raise UserError("target_modules 'all-linear' does not fit this model.", field="method")
        return forecast_memory(config)

    with raises_user_error(field="method", naming=("target_modules",)):
        make_plan(
            make_inputs(24 * GB, forecast_memory=no_layers, context_length=128, lengths=[128] * 500)
        )


def test_a_failed_simulation_is_an_error_and_not_a_reason_for_another_method():
    def broke_off(config):
        raise UserError("The simulation failed (OSError).", code="transient")

    with raises_user_error(code="transient"):
        make_plan(make_inputs(24 * GB, forecast_memory=broke_off))


def test_with_a_locked_optimizer_only_the_weights_use_fewer_bits():
    def by_bits(config):
        return forecast_memory(config) | {
            "peak": {"bf16": 30}.get(config.precision, 60) * GB,
            "optimizer": "adamw_8bit",
        }

    plan = make_plan(
        make_inputs(40 * GB, forecast_memory=by_bits),
        locked={"method": "full", "optim": "adamw_8bit"},
    )
    assert plan.settings["precision"] == "bf16"
    with raises_user_error(code=NOTHING_FITS):
        make_plan(
            make_inputs(40 * GB, forecast_memory=by_bits),
            locked={"method": "full", "optim": "adamw_torch"},
        )


def test_the_alternative_is_never_the_chosen_value():
    for steps in (3, 19, 60, 1000):
        eval_choice = find_choice(
            make_plan(make_inputs(24 * GB, count_steps=lambda config, steps=steps: steps)),
            "eval_steps",
        )
        assert not eval_choice.alternative.startswith(f"{eval_choice.value:,} ")
