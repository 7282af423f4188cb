"""Trials before a run: the plan's guess first, losers stopped early, the winner goes on where it
stands, judged on rows unseen.
"""

import json
from types import SimpleNamespace

import pytest

from tests import tiny
from training.engine.config import RunConfig
from training.engine.outcome import Outcome
from training.engine.stop_signals import StopSignals
from training.engine.tuning.search import Search, Trial, compare, kept_trials, rungs_of, settings_of
from training.engine.tuning.tune import Bench
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


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def make(tiny_run):
    """A run folder with 20 held-out rows."""

    def made(name="run", **settings):
        folder = tiny_run(name, rows=ROWS, **settings)
        (folder / "heldout.jsonl").write_bytes(b"".join(tiny.encode_jsonl(ROWS[:20])))
        return folder

    return made


@pytest.fixture
def tuned(make, engine_once):
    folder = make(**TRIALS)
    assert engine_once([str(folder)]) == 0, (folder / "events.jsonl").read_text()[-2000:]
    return folder


def test_it_works(tuned):
    told = events(tuned)
    trials = list(kept_trials(tuned))
    assert len(trials) >= 4
    assert trials[0].settings == {
        "learning_rate": 0.001,
        "rank": 4,
        "alpha": 8,
        "target_modules": "all-linear",
    }
    assert trials[0].state == "done", "the plan's guess goes all the way"
    assert {trial.state for trial in trials} >= {"done", "stopped"}
    assert sum(trial.step for trial in trials) >= 36, "the budget is spent"
    last = next(event for event in told if event["kind"] == "tuned")
    done = [trial for trial in trials if trial.state == "done"]
    best = min(done, key=lambda trial: trial.losses[trial.step])
    assert last["winner"] in (0, best.number) and last["rows"] == 10
    steps = [event["step"] for event in told if event["kind"] == "step"]
    assert steps == list(range(1, 25)), "the winner goes on and the curve is whole"
    adapter = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == last["settings"]["rank"]


def test_one_base_serves_all_trials(tuned):
    assert sum(event.get("name") == "loading model" for event in events(tuned)) == 1


def test_the_first_trial_is_the_run_itself(tuned, make, engine_here):
    """Trials follow the whole run's schedule, so the plan's guess learns just as it would have."""
    plain = make(
        "plain", max_steps=24, eval_rows=20, eval_steps=8, learning_rate=0.001, rank=4, alpha=8
    )
    assert engine_here([str(plain)]) == 0
    losses = [event["loss"] for event in events(plain) if event["kind"] == "step"]
    first = next(iter(kept_trials(tuned)))
    assert [step["loss"] for step in first.steps] == losses[: first.step]


def test_a_killed_engine_goes_on_with_the_next_trial(make, engine_here, monkeypatch):
    broken = make("broken", **TRIALS)
    calls = []
    plain = StopSignals.requested_stop

    def requested_stop(self):
        calls.append(1)
        return Outcome.PREEMPTED if len(calls) == 18 else plain(self)

    monkeypatch.setattr(StopSignals, "requested_stop", requested_stop)
    assert engine_here([str(broken)]) != 0
    before = list(kept_trials(broken))
    assert before
    monkeypatch.setattr(StopSignals, "requested_stop", plain)
    assert engine_here([str(broken)]) == 0
    after = list(kept_trials(broken))
    assert [trial.losses for trial in after[: len(before)]] == [trial.losses for trial in before]
    steps = [event["step"] for event in events(broken) if event["kind"] == "step"]
    assert steps == list(range(1, 25))


def test_too_few_heldout_rows_are_refused_before_anything_is_trained(tiny_run, engine_here):
    folder = tiny_run(max_steps=8, tuning_budget_fraction=1.0, eval_rows=3)
    assert engine_here([str(folder)]) != 0
    assert "too few; hold out 8" in events(folder)[-1]["message"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"tuning_budget_fraction": 0.5, "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"tuning_budget_fraction": 0.5, "tuning_search_space": "learning_rate,luck"}, "tuning_search_space"),
        ({"tuning_budget_fraction": 0.5, "method": "prompt"}, "tuning_budget_fraction"),
    ],
)
def test_contradictions_are_refused(given, field):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(given)
    assert caught.value.field == field


def test_locked_settings_are_not_varied():
    config = RunConfig.from_dict({"tuning_budget_fraction": 1.0, "tuning_search_space": "learning_rate"})
    search = Search(config, ["all-linear", "q_proj"], [2, 4, 8], seed=0)
    made = [search.ask() for _ in range(4)]
    assert {trial.settings["rank"] for trial in made} == {16} and {
        trial.settings["target_modules"] for trial in made
    } == {"all-linear"}
    assert len({trial.settings["learning_rate"] for trial in made}) == 4


def test_what_is_not_varied_stays_as_it_is():
    config = RunConfig.from_dict(
        {"rank": 8, "alpha": 8, "learning_rate": 0.0012345, "tuning_budget_fraction": 1.0, "tuning_search_space": "rank"}
    )
    found = settings_of(config, {"rank": 16})
    assert found["alpha"] == 8 and found["learning_rate"] == 0.0012345
    assert settings_of(config, {"rank": 1024, "alpha": 8.0})["alpha"] == 4096


def test_a_guess_that_diverges_leaves_the_run_to_the_best_of_the_others(
    make, engine_here, monkeypatch
):
    from training.engine.tuning import tune

    plain = tune.take_step

    def step(session):
        if session.config.learning_rate == 0.001 and session.step == 3:
            raise tune.Diverged("The loss became nan.")
        return plain(session)

    monkeypatch.setattr(tune, "take_step", step)
    folder = make(
        max_steps=24,
        tuning_budget_fraction=1.5,
        eval_rows=20,
        eval_steps=8,
        learning_rate=0.001,
        tuning_search_space="learning_rate",
    )
    assert engine_here([str(folder)]) == 0
    last = next(event for event in events(folder) if event["kind"] == "tuned")
    assert last["winner"] > 0 and "own guess failed" in last["message"]
    assert next(iter(kept_trials(folder))).state == "failed"


def test_a_guess_that_cannot_take_one_step_ends_the_run_as_without_trials(
    make, engine_here, monkeypatch
):
    from training.engine.tuning import tune

    def step(session):
        raise tune.Diverged("The loss became nan.")

    monkeypatch.setattr(tune, "take_step", step)
    folder = make(max_steps=24, tuning_budget_fraction=1.5, eval_rows=20)
    assert engine_here([str(folder)]) != 0
    assert events(folder)[-1]["outcome"] == "diverged"


def test_a_choice_that_was_made_and_not_told_is_told_by_the_next_attempt(tuned, engine_here):
    from training.engine.tuning.selection import chosen, write_chosen

    verdict = chosen(tuned)
    verdict.pop("told")
    write_chosen(tuned, verdict, told=False)
    (tuned / "result.json").unlink()
    assert engine_here([str(tuned)]) == 0
    assert [event["words"] for event in events(tuned) if event["kind"] == "tuned"] == [
        verdict["words"]
    ] * 2
    assert chosen(tuned)["told"]


def test_memory_is_forecast_for_the_largest_rank_that_a_trial_may_take():
    assert RunConfig.from_dict({"tuning_budget_fraction": 0.5}).memory_upper_bound().rank == 32
    assert (
        RunConfig.from_dict({"tuning_budget_fraction": 0.5, "tuning_search_space": "learning_rate"}).memory_upper_bound().rank == 16
    )
    assert RunConfig().memory_upper_bound().rank == 16


def test_the_comparison_knows_what_is_chance():
    plan = Trial(0, {}, {}, unseen=[2.0, 3.0, 2.5, 2.0] * 10)
    luckier = Trial(1, {}, {}, unseen=[1.9, 3.1, 2.4, 2.1] * 10)
    better = Trial(2, {}, {}, unseen=[1.5, 2.4, 1.9, 1.6] * 10)
    tokens = [2] * 40
    difference, error = compare(plan, luckier, tokens)
    assert abs(difference) < 2 * error
    difference, error = compare(plan, better, tokens)
    assert difference > 2 * error


def test_rungs_halve_down_from_a_quarter_of_the_budget_and_none_comes_before_the_warm_up_is_over():
    config = RunConfig.from_dict({"warmup_ratio": 0.0})
    assert rungs_of(80, config, 200) == [5, 10, 20]
    assert rungs_of(4, config, 100) == [2, 4]
    assert rungs_of(80, RunConfig.from_dict({"warmup_ratio": 0.05}), 200) == [15, 30]


def test_minutes_become_steps_by_what_the_trials_really_take():
    bench = Bench(
        SimpleNamespace(config=SimpleNamespace(tuning_budget_minutes=1.0)), None, [], [], budget=500
    )
    bench.spent = 20
    bench.count(SimpleNamespace(seconds=30.0))
    assert bench.budget == 40, "20 steps took half of the minute, measuring and saving included"
    bench.session.config.tuning_budget_minutes = 0.0
    bench.count(SimpleNamespace(seconds=30.0))
    assert bench.budget == 40
