import json
import shutil

import pytest

from tests import tiny
from tests.launching import launch_run
from training.engine.config import RunConfig
from training.errors import ConfigError, Conflict, UserError
from training.people.models import Team
from training.runs.actions import continue_run, stop_run
from training.runs.models import Run
from training.runs.states import TRANSITIONS, RequestedAction, State
from training.runs.worker.lease import claim_run

pytestmark = pytest.mark.django_db


def test_it_works(run, no_queue, base_model, data):
    config = RunConfig.from_dict(json.loads((run.folder / "config.json").read_text()))
    assert config.model == str(base_model.folder)
    assert config.model_name == "tiny-llama"
    assert config.train_data == str(data.split_path("train"))
    assert config.rank == tiny.SETTINGS["rank"]
    assert run.state == State.QUEUED
    assert no_queue == [run.pk]


def test_a_wrong_setting_is_refused_and_nothing_is_left(alice, base_model, data):
    with pytest.raises(ConfigError, match="rank is 0"):
        launch_run(alice, base_model=base_model, data=data, settings={"rank": 0})
    assert Run.objects.count() == 0


@pytest.mark.parametrize("name", ["model", "train_data", "eval_data", "model_name"])
def test_paths_cannot_be_set_from_outside(alice, base_model, data, name):
    with pytest.raises(UserError, match="set by SnapML"):
        launch_run(alice, base_model=base_model, data=data, settings={name: "/etc/passwd"})


def test_a_model_that_is_not_ready_is_refused(alice, base_model, data):
    base_model.state = "importing"
    with pytest.raises(Conflict, match="not ready yet"):
        launch_run(alice, base_model=base_model, data=data, settings={})


def test_a_folder_that_a_killed_launch_left_is_no_obstacle(run, alice, base_model, data, no_queue):
    # Its row was rolled back, and its number is given out again
    left = run.folder.with_name(str(run.pk + 1))
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    (left / "result.json").write_text("{}")
    again = launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    assert again.folder == left
    assert [path.name for path in left.iterdir()] == ["config.json"]


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


def test_a_name_holds_no_control_characters(alice, base_model, data, no_queue):
    run = launch_run(
        alice, base_model=base_model, data=data, settings=tiny.SETTINGS, name="a\0b\nc\x1b[31m"
    )
    assert run.name == "a b c [31m"


def test_a_waiting_run_stops_at_once(run):
    assert stop_run(run, discard=False).state == State.CANCELLED
    with pytest.raises(Conflict, match="has ended already"):
        stop_run(run, discard=False)


def test_a_waiting_run_with_a_checkpoint_is_stopped_and_keeps_it_or_discards_it(run):
    (run.folder / "checkpoints").mkdir()
    assert stop_run(run, discard=False).state == State.STOPPED
    assert (run.folder / "checkpoints").exists()
    continue_run(run.owner, run)
    assert stop_run(run, discard=True).state == State.CANCELLED
    assert not (run.folder / "checkpoints").exists()


def test_a_living_run_is_asked_to_stop(run):
    claim_run(run.pk)
    stopped = stop_run(run, discard=True)
    assert (stopped.state, stopped.requested_action) == (State.STOPPING, RequestedAction.DISCARD)


def test_a_stopped_run_goes_on_and_a_finished_one_does_not(
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


def test_the_table_of_moves_names_every_state():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.FINISHED] == TRANSITIONS[State.CANCELLED] == frozenset()
