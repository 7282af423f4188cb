"""Recover from out of memory: the options, their forecasts, and resuming from the checkpoint."""

import json
import signal

import pytest

from tests import tiny
from tests.launching import launch_run
from tests.runs.fake_engine import FakeEngine
from tests.user_errors import raises_user_error
from training.engine.config import RunConfig
from training.engine.outcome import Outcome, Result
from training.errors import Conflict, UserError
from training.gpus.models import PersonalQuota
from training.runs.forecast.memory_options import suggest_fitting_change
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Run
from training.runs.states import State
from training.runs.worker import oom_recovery
from training.runs.worker.lease import claim_run
from training.runs.worker.supervisor import RunSupervisor

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """A simple estimator that uses only batch size and checkpointing. Real ones take seconds and
    are tested in test_memory.py.
    """
    monkeypatch.setattr(
        "training.runs.forecast.memory_options.get_cached_estimator",
        lambda _folder, config, _device: config,
    )
    monkeypatch.setattr(
        "training.runs.forecast.memory_options.forecast_memory",
        lambda estimator, config, _lengths, _overhead: {
            "peak": (4 if config.gradient_checkpointing else 16) * GB // config.micro_batch_splits
        },
    )


def run_out_of_memory(run, *, code=91, outcome=Outcome.OUT_OF_MEMORY, **config):
    Run.objects.filter(pk=run.pk).update(config={**run.config, **config})
    run_supervisor = RunSupervisor(claim_run(run.pk))
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING, step=41)
    run_supervisor.engine = FakeEngine(code)
    if outcome:
        Result(outcome=outcome, message="Out of memory at step 41, while evaluating.").write_file(
            run.folder
        )
    run_supervisor.handle_exit()
    run.refresh_from_db()


def test_a_run_out_of_memory_offers_options_with_their_forecasts(run):
    run_out_of_memory(run)
    assert (run.state, run.failure, run.message) == (
        "failed",
        "out_of_memory",
        "Out of memory at step 41, while evaluating.",
    )
    options = {
        way.name: (way.changes, way.memory["peak"])
        for way in oom_recovery.list_recovery_options(run)
    }
    assert options["halve"] == ({"micro_batch_splits": 2}, 8 * GB)
    assert options["checkpointing"] == ({"gradient_checkpointing": True}, 4 * GB)
    assert options["8-bit"][0] == {"optim": "adamw_8bit"}
    assert options["qlora"][0] == {"method": "qlora"}


def test_applying_an_option_changes_the_run_and_queues_it_again(run, alice):
    run_out_of_memory(run)
    oom_recovery.apply_memory_option(alice, run, "halve")
    run.refresh_from_db()
    assert (run.state, run.failure, run.config["micro_batch_splits"], run.forecast["peak"]) == (
        "queued",
        "",
        2,
        8 * GB,
    )
    written = json.loads((run.folder / "config.json").read_text())
    assert written["micro_batch_splits"] == 2
    assert RunConfig.from_dict(written).model.endswith("tiny-llama")
    assert not (run.folder / "result.json").exists()


def test_an_unknown_option_is_rejected_and_an_active_run_is_not_changed(run, alice):
    with pytest.raises(Conflict):
        oom_recovery.apply_memory_option(alice, run, "halve")
    run_out_of_memory(run)
    with raises_user_error(code="no_memory_option", field="option", naming=("magic",)):
        oom_recovery.apply_memory_option(alice, run, "magic")


def test_auto_reduce_memory_recovers_automatically(run):
    run_out_of_memory(run, auto_reduce_memory=True)
    assert (run.state, run.config["micro_batch_splits"], run.crash_count) == ("queued", 2, 0)
    assert run.message.endswith("from the last checkpoint with micro_batch_splits 2.")
    assert not (run.folder / "result.json").exists()


def test_a_run_killed_by_its_host_recovers_with_the_same_options(run, few_crashes):
    Run.objects.filter(pk=run.pk).update(crash_count=1)
    run_out_of_memory(run, code=-signal.SIGKILL, outcome=None, auto_reduce_memory=True)
    assert (run.state, run.config["micro_batch_splits"]) == ("queued", 2)
    assert "killed (SIGKILL" in run.message and "micro_batch_splits 2" in run.message
    assert run.message.count("Resuming") == 1


def test_a_run_killed_too_often_offers_memory_options(run, few_crashes, as_alice):
    Run.objects.filter(pk=run.pk).update(crash_count=3)
    run_out_of_memory(run, code=-signal.SIGKILL, outcome=None)
    assert (run.state, run.failure) == ("failed", "killed")
    assert b"with lower memory use" in as_alice.get(f"/runs/{run.pk}").content
    assert b"Resume with this" in as_alice.get(f"/runs/{run.pk}/memory-options").content


@pytest.fixture
def few_crashes(settings):
    settings.MAX_CRASHES = 3


def test_a_launch_that_cannot_fit_suggests_the_nearest_change_that_does(
    alice, base_model, data, device, no_queue, monkeypatch
):
    assert "micro_batch_splits 2 it would need 8.0 GB" in suggest_fitting_change(
        RunConfig(), base_model, data, 10 * GB, get_target_device()
    )
    assert "gradient_checkpointing True it would need 4.0 GB" in suggest_fitting_change(
        RunConfig(), base_model, data, 5 * GB, get_target_device()
    )
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 30 * GB}
    )
    with pytest.raises(UserError, match=r"micro_batch_splits 2 it would need 8\.0 GB"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_a_rejected_option_changes_nothing(run, alice):
    run_out_of_memory(run)
    PersonalQuota.objects.create(user=alice, max_queued=0)
    before = (run.folder / "config.json").read_text()
    with pytest.raises(Conflict):
        oom_recovery.apply_memory_option(alice, run, "halve")
    run.refresh_from_db()
    assert (run.folder / "config.json").read_text() == before
    assert "micro_batch_splits" not in run.config or run.config["micro_batch_splits"] == 1


def test_missing_forecasts_are_simulated_one_per_request(run, as_alice, monkeypatch):
    simulated_configs = []
    monkeypatch.setattr(
        "training.runs.forecast.memory_options.get_cached_estimator",
        lambda _folder, config, _device: config if config in simulated_configs else None,
    )
    monkeypatch.setattr(
        "training.runs.worker.oom_recovery.get_estimator",
        lambda _folder, config, _device: simulated_configs.append(config),
    )
    run_out_of_memory(run)
    first = as_alice.get(f"/runs/{run.pk}/memory-options").content
    assert (first.count(b"simulating"), b"forecast=1" in first, simulated_configs) == (4, True, [])
    as_alice.get(f"/runs/{run.pk}/memory-options?forecast=1")
    assert len(simulated_configs) == 1
    for _ in range(3):
        last = as_alice.get(f"/runs/{run.pk}/memory-options?forecast=1").content
    assert (last.count(b"simulating"), b"forecast=1" in last) == (0, False)
