"""Hyperparameter tuning: the planned settings are the first trial, bad trials stop early, and the
run continues with the winner.
"""

import json
from types import SimpleNamespace

import pytest

from tests import tiny
from tests.user_errors import assert_mentions
from training.engine.config import RunConfig
from training.engine.outcome import Outcome
from training.engine.stop_requests import StopRequests
from training.engine.tuning.search import (
    Search,
    Trial,
    compare_trials,
    compute_rungs,
    load_trials,
    params_to_settings,
)
from training.engine.tuning.tune import TuningRun
from training.errors import ConfigError

ROWS = [*tiny.ROWS] * 4
TRIALS = {
    "max_steps": 24,
    "tuning_budget_fraction": 1.5,
    "eval_rows": 20,
    "eval_steps": 8,
    "learning_rate": 0.001,
    "rank": 4,
    "alpha": 8,
}


def read_journal(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def make_run(tiny_run):
    """A run folder with 20 held-out rows."""

    def build_run(name="run", **settings):
        folder = tiny_run(name, rows=ROWS, **settings)
        (folder / "eval.jsonl").write_bytes(b"".join(tiny.encode_jsonl(ROWS[:20])))
        return folder

    return build_run


@pytest.fixture
def tuned_run(make_run, engine_once):
    folder = make_run(**TRIALS)
    assert engine_once([str(folder)]) == 0, (folder / "events.jsonl").read_text()[-2000:]
    return folder


def test_trials_spend_the_budget_and_the_run_continues_with_the_winner(tuned_run):
    all_events = read_journal(tuned_run)
    trials = list(load_trials(tuned_run))
    assert len(trials) >= 4
    assert trials[0].settings == {
        "learning_rate": 0.001,
        "rank": 4,
        "alpha": 8,
        "target_modules": "all-linear",
    }
    assert trials[0].state == "done", "the planned settings complete their trial"
    assert {trial.state for trial in trials} >= {"done", "stopped"}
    assert sum(trial.step for trial in trials) >= 36, "the budget is spent"
    tuned_event = next(event for event in all_events if event["kind"] == "tuned")
    done = [trial for trial in trials if trial.state == "done"]
    best = min(done, key=lambda trial: trial.losses[trial.step])
    assert tuned_event["winner"] in (0, best.number) and tuned_event["rows"] == 10
    steps = [event["step"] for event in all_events if event["kind"] == "step"]
    assert steps == list(range(1, 25)), (
        "the run continues with the winner and its curve is complete"
    )
    adapter = json.loads((tuned_run / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == tuned_event["settings"]["rank"]


def test_all_trials_share_one_base_model(tuned_run):
    assert sum(event.get("name") == "loading model" for event in read_journal(tuned_run)) == 1


def test_the_first_trial_equals_the_run_without_tuning(tuned_run, make_run, engine_here):
    """Trials follow the schedule of the complete run, so the first one trains identically."""
    plain = make_run(
        "plain", max_steps=24, eval_rows=20, eval_steps=8, learning_rate=0.001, rank=4, alpha=8
    )
    assert engine_here([str(plain)]) == 0
    losses = [event["loss"] for event in read_journal(plain) if event["kind"] == "step"]
    first = next(iter(load_trials(tuned_run)))
    assert [step["loss"] for step in first.steps] == losses[: first.step]


def test_a_killed_engine_continues_with_the_next_trial(make_run, engine_here, monkeypatch):
    broken = make_run("broken", **TRIALS)
    calls = []
    original = StopRequests.get_requested_stop

    def get_requested_stop(self):
        calls.append(1)
        return Outcome.PREEMPTED if len(calls) == 18 else original(self)

    monkeypatch.setattr(StopRequests, "get_requested_stop", get_requested_stop)
    assert engine_here([str(broken)]) != 0
    before = list(load_trials(broken))
    assert before
    monkeypatch.setattr(StopRequests, "get_requested_stop", original)
    assert engine_here([str(broken)]) == 0
    after = list(load_trials(broken))
    assert [trial.losses for trial in after[: len(before)]] == [trial.losses for trial in before]
    steps = [event["step"] for event in read_journal(broken) if event["kind"] == "step"]
    assert steps == list(range(1, 25))


def test_too_few_held_out_rows_are_rejected_before_training(tiny_run, engine_here):
    folder = tiny_run(max_steps=8, tuning_budget_fraction=1.0, eval_rows=3)
    assert engine_here([str(folder)]) != 0
    assert_mentions(read_journal(folder)[-1]["message"], 8, 3)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"tuning_budget_fraction": 0.5, "init_lora_weights": "pissa"}, "init_lora_weights"),
        (
            {"tuning_budget_fraction": 0.5, "tuning_search_space": "learning_rate,luck"},
            "tuning_search_space",
        ),
        ({"tuning_budget_fraction": 0.5, "method": "prompt"}, "tuning_budget_fraction"),
    ],
)
def test_contradictory_tuning_settings_are_rejected(values, field):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(values)
    assert caught.value.field == field


def test_locked_settings_are_not_varied():
    config = RunConfig.from_dict(
        {"tuning_budget_fraction": 1.0, "tuning_search_space": "learning_rate"}
    )
    search = Search(config, ["all-linear", "q_proj"], [2, 4, 8], seed=0)
    trials = [search.ask() for _ in range(4)]
    assert {trial.settings["rank"] for trial in trials} == {16} and {
        trial.settings["target_modules"] for trial in trials
    } == {"all-linear"}
    assert len({trial.settings["learning_rate"] for trial in trials}) == 4


def test_settings_that_are_not_varied_keep_their_value():
    config = RunConfig.from_dict(
        {
            "rank": 8,
            "alpha": 8,
            "learning_rate": 0.0012345,
            "tuning_budget_fraction": 1.0,
            "tuning_search_space": "rank",
        }
    )
    settings = params_to_settings(config, {"rank": 16})
    assert settings["alpha"] == 8 and settings["learning_rate"] == 0.0012345
    assert params_to_settings(config, {"rank": 1024, "alpha": 8.0})["alpha"] == 4096


def test_if_the_planned_settings_diverge_the_best_other_trial_is_used(
    make_run, engine_here, monkeypatch
):
    from training.engine.tuning import tune

    original = tune.take_step

    def fail_once(session):
        if session.config.learning_rate == 0.001 and session.step == 3:
            raise tune.Diverged("The loss became nan.")
        return original(session)

    monkeypatch.setattr(tune, "take_step", fail_once)
    folder = make_run(
        max_steps=24,
        tuning_budget_fraction=1.5,
        eval_rows=20,
        eval_steps=8,
        learning_rate=0.001,
        tuning_search_space="learning_rate",
    )
    assert engine_here([str(folder)]) == 0
    tuned_event = next(event for event in read_journal(folder) if event["kind"] == "tuned")
    assert tuned_event["winner"] > 0 and tuned_event["rows"] == 0
    assert next(iter(load_trials(folder))).state == "failed"


def test_if_the_planned_settings_fail_at_the_first_step_the_run_ends(
    make_run, engine_here, monkeypatch
):
    from training.engine.tuning import tune

    def always_fail(session):
        raise tune.Diverged("The loss became nan.")

    monkeypatch.setattr(tune, "take_step", always_fail)
    folder = make_run(max_steps=24, tuning_budget_fraction=1.5, eval_rows=20)
    assert engine_here([str(folder)]) != 0
    assert read_journal(folder)[-1]["outcome"] == "diverged"


def test_a_selection_without_event_is_emitted_by_the_next_attempt(tuned_run, engine_here):
    from training.engine.tuning.selection import load_selection, save_selection

    selection = load_selection(tuned_run)
    selection.pop("is_emitted")
    save_selection(tuned_run, selection, is_emitted=False)
    (tuned_run / "result.json").unlink()
    assert engine_here([str(tuned_run)]) == 0
    assert [event["message"] for event in read_journal(tuned_run) if event["kind"] == "tuned"] == [
        selection["message"]
    ] * 2
    assert load_selection(tuned_run)["is_emitted"]


def test_memory_is_forecast_for_the_largest_rank_of_a_trial():
    assert RunConfig.from_dict({"tuning_budget_fraction": 0.5}).to_memory_upper_bound().rank == 32
    assert (
        RunConfig.from_dict({"tuning_budget_fraction": 0.5, "tuning_search_space": "learning_rate"})
        .to_memory_upper_bound()
        .rank
        == 16
    )
    assert RunConfig().to_memory_upper_bound().rank == 16


def test_the_comparison_separates_chance_from_improvement():
    baseline = Trial(0, {}, {}, comparison_losses=[2.0, 3.0, 2.5, 2.0] * 10)
    lucky_trial = Trial(1, {}, {}, comparison_losses=[1.9, 3.1, 2.4, 2.1] * 10)
    better_trial = Trial(2, {}, {}, comparison_losses=[1.5, 2.4, 1.9, 1.6] * 10)
    tokens = [2] * 40
    difference, standard_error = compare_trials(baseline, lucky_trial, tokens)
    assert abs(difference) < 2 * standard_error
    difference, standard_error = compare_trials(baseline, better_trial, tokens)
    assert difference > 2 * standard_error


def test_rungs_halve_a_quarter_of_the_budget_and_start_after_the_warm_up():
    config = RunConfig.from_dict({"warmup_ratio": 0.0})
    assert compute_rungs(80, config, 200) == [5, 10, 20]
    assert compute_rungs(4, config, 100) == [2, 4]
    assert compute_rungs(80, RunConfig.from_dict({"warmup_ratio": 0.05}), 200) == [15, 30]


def test_a_budget_in_minutes_is_converted_by_the_measured_time_of_trials():
    tuning = TuningRun(
        SimpleNamespace(config=SimpleNamespace(tuning_budget_minutes=1.0)), None, [], [], budget=500
    )
    tuning.spent = 20
    tuning.add_trial_time(SimpleNamespace(seconds=30.0))
    assert tuning.budget == 40, "20 steps took half of the minute, including evaluation and saving"
    tuning.session.config.tuning_budget_minutes = 0.0
    tuning.add_trial_time(SimpleNamespace(seconds=30.0))
    assert tuning.budget == 40
