"""Launching a run: its folder, settings, team and name; stopping and resuming it."""

import json
import shutil

import pytest

from tests import tiny
from tests.launching import launch_run
from tests.runs.supervision import add_checkpoint
from tests.user_errors import raises_user_error
from training.engine.config import RunConfig
from training.errors import ConfigError, Conflict
from training.people.models import Team
from training.runs.actions import continue_run, stop_run
from training.runs.models import Run
from training.runs.states import TRANSITIONS, RequestedAction, State
from training.runs.worker.lease import claim_run

pytestmark = pytest.mark.django_db


def test_a_launch_writes_the_config_and_queues_the_run(run, no_queue, base_model, data):
    config = RunConfig.from_dict(json.loads((run.folder / "config.json").read_text()))
    assert config.model == str(base_model.folder)
    assert config.model_name == "tiny-llama"
    assert config.train_data == str(data.split_path("train"))
    assert config.rank == tiny.SETTINGS["rank"]
    assert run.state == State.QUEUED
    assert no_queue == [run.pk]


def test_an_invalid_setting_is_rejected_and_nothing_is_left(alice, base_model, data):
    with raises_user_error(ConfigError, field="rank", naming=[0]):
        launch_run(alice, base_model=base_model, data=data, settings={"rank": 0})
    assert Run.objects.count() == 0


@pytest.mark.parametrize("name", ["model", "train_data", "eval_data", "model_name"])
def test_internal_settings_cannot_be_set(alice, base_model, data, name):
    with raises_user_error(code="internal_setting", field=name):
        launch_run(alice, base_model=base_model, data=data, settings={name: "/etc/passwd"})


def test_a_model_that_is_not_ready_is_rejected(alice, base_model, data):
    base_model.state = "importing"
    with raises_user_error(Conflict, code="model_not_ready", field="model"):
        launch_run(alice, base_model=base_model, data=data, settings={})


def test_a_folder_of_a_killed_launch_is_replaced(run, alice, base_model, data, no_queue):
    # The row was rolled back and its id is reused.
    leftover = run.folder.with_name(str(run.pk + 1))
    shutil.rmtree(leftover, ignore_errors=True)
    leftover.mkdir()
    (leftover / "result.json").write_text("{}")
    again = launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    assert again.folder == leftover
    assert [path.name for path in leftover.iterdir()] == ["config.json"]


def test_a_run_is_shared_only_with_a_team_that_sees_its_data(
    alice, people, base_model, data, no_queue
):
    first = Team.objects.create(name="aaa")
    first.members.add(alice)
    shared = launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    assert shared.team.name == "voice"
    data.dataset.team = None
    data.dataset.save()
    assert launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS).team is None


def test_control_characters_are_removed_from_a_name(alice, base_model, data, no_queue):
    run = launch_run(
        alice, base_model=base_model, data=data, settings=tiny.SETTINGS, name="a\0b\nc\x1b[31m"
    )
    assert run.name == "a b c [31m"


def test_a_queued_run_stops_immediately(run):
    assert stop_run(run, discard=False).state == State.CANCELLED
    with pytest.raises(Conflict):
        stop_run(run, discard=False)


def test_stopping_a_queued_run_keeps_or_discards_its_checkpoint(run):
    add_checkpoint(run)
    assert stop_run(run, discard=False).state == State.STOPPED
    assert (run.folder / "checkpoints").exists()
    continue_run(run.owner, run)
    assert stop_run(run, discard=True).state == State.CANCELLED
    assert not (run.folder / "checkpoints").exists()


def test_a_running_run_gets_a_stop_request(run):
    claim_run(run.pk)
    stopped = stop_run(run, discard=True)
    assert (stopped.state, stopped.requested_action) == (State.STOPPING, RequestedAction.DISCARD)


def test_a_stopped_run_can_be_resumed_and_a_finished_one_cannot(
    run, django_capture_on_commit_callbacks, no_queue
):
    Run.objects.filter(pk=run.pk).update(state=State.STOPPED, requested_action=RequestedAction.STOP)
    for name in ("stop", "result.json"):
        (run.folder / name).write_text("{}")
    with django_capture_on_commit_callbacks(execute=True):
        assert continue_run(run.owner, run).state == State.QUEUED
    assert no_queue[-1] == run.pk
    assert not (run.folder / "stop").exists()
    assert not (run.folder / "result.json").exists()
    Run.objects.filter(pk=run.pk).update(state=State.FINISHED)
    with pytest.raises(Conflict):
        continue_run(run.owner, run)


def test_the_transition_table_has_every_state():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.FINISHED] == TRANSITIONS[State.CANCELLED] == frozenset()
