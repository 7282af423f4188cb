"""Versions: made of runs and checkpoints, never rewritten, tagged, gone on from, deleted; and where
each came from.
"""

import io
import json
import shutil
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from adapters.models import AdapterVersion
from adapters.registry import actions, continue_training
from adapters.registry import services as registry_services
from adapters.registry.provenance import build_provenance
from adapters.serving import services as serving_services
from adapters.serving.services import Routing
from tests import tiny
from tests.registry import register_version, train_version
from tests.user_errors import raises_user_error
from training.engine.outcome import read_result
from training.errors import ConfigError, Conflict, NotAllowed, NotFound, UserError
from training.gpus.models import Allocation, Device
from training.jobs.models import Job
from training.runs.launch.yaml_file import to_yaml
from training.runs.models import Event, Run

pytestmark = pytest.mark.django_db


@pytest.fixture
def trained(alice, base_model, data, device, no_queue, engine_once):
    return train_version(alice, base_model, data, engine_once)


def test_a_version_keeps_what_was_true_when_it_was_made(trained, data, base_model):
    provenance = trained.provenance
    assert provenance["settings"]["rank"] == tiny.SETTINGS["rank"]
    assert provenance["data"] == {
        "name": "Lights v1",
        "digest": data.digest,
        "train_rows": data.train_rows,
        "eval_rows": data.eval_rows,
    }
    assert provenance["base"]["name"] == base_model.name
    assert set(trained.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert trained.sha256 == trained.files["adapter_model.safetensors"]["sha256"]
    trained.run.delete()
    trained.refresh_from_db()
    assert trained.run is None
    assert trained.provenance["run"]["name"] == "Lights"


def test_the_same_weights_are_one_version_and_new_ones_another(trained):
    run = trained.run
    registry_services.register_run_result(run, read_result(run.folder))
    assert run.versions.count() == 1
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    before = trained.folder.joinpath("adapter_model.safetensors").read_bytes()
    registry_services.register_run_result(run, read_result(run.folder))
    assert [version.number for version in run.versions.order_by("number")] == [1, 2]
    assert trained.folder.joinpath("adapter_model.safetensors").read_bytes() == before


def test_any_kept_checkpoint_becomes_a_version(alice, people, trained):
    from training.runs.run_files import list_checkpoint_steps

    run = trained.run
    steps = list_checkpoint_steps(run)
    assert len(steps) >= 2
    version = registry_services.register_checkpoint(alice, run, steps[0])
    assert (version.step, version.number) == (steps[0], 2)
    assert not {"state.safetensors", "state.json", "manifest.json"} & set(version.files)
    assert registry_services.register_checkpoint(alice, run, steps[0]) == version
    with raises_user_error(NotFound, naming=(999,)):
        registry_services.register_checkpoint(alice, run, 999)
    with pytest.raises(NotAllowed):
        registry_services.register_checkpoint(people["mallory"], run, steps[0])


def test_a_run_goes_on_from_a_versions_weights(
    alice, trained, engine_here, django_capture_on_commit_callbacks
):
    with django_capture_on_commit_callbacks(execute=True):
        run = continue_training.continue_from(
            alice, trained, changes={"max_steps": 1, "learning_rate": 1e-8}
        )
    assert engine_here([str(run.folder)]) == 0
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    before, after = load_file(trained.folder / name), load_file(run.folder / "adapter" / name)
    assert all((after[key] - value).abs().max() < 1e-6 for key, value in before.items())
    registry_services.register_run_result(Run.objects.get(pk=run.pk), read_result(run.folder))
    child = AdapterVersion.objects.get(run=run)
    assert (child.parent, child.name, child.number) == (trained, "Lights", 2)
    tree = actions.build_lineage(alice, child)
    assert [(one.version, one.depth, one.is_current) for one in tree] == [
        (trained, 0, False),
        (child, 1, True),
    ]


def test_a_run_from_a_version_keeps_its_weights_when_it_is_launched_again_from_its_file(
    alice, people, trained, tmp_path
):
    run = continue_training.continue_from(alice, trained, changes={"max_steps": 1})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    options = {"accept_warnings": True, "stdout": io.StringIO()}
    call_command("launch", str(file), user="alice", **options)
    again = Run.objects.latest("pk")
    assert (again.from_version, again.config, again.request) == (
        trained.pk,
        run.config,
        run.request,
    )
    config = json.loads((again.folder / "config.json").read_text())
    assert config["start_weights"] == str(trained.folder)
    with pytest.raises(CommandError, match="not there, or not yours to see"):
        file.write_text(to_yaml(run).replace("Lights", "Others").replace(trained.sha256, "0" * 64))
        call_command("launch", str(file), user="alice", **options)
    assert Run.objects.count() == 3


def test_new_from_a_run_that_began_with_a_version_begins_with_it_too(client, alice, trained):
    client.force_login(alice)
    run = continue_training.continue_from(alice, trained)
    page = client.get(f"/runs/new?from={run.pk}")
    assert page.context["start_weights"].version == trained.pk
    assert f'name="from_version" value="{trained.pk}" checked' in page.content.decode()
    form = {name: str(value) for name, value in run.config.items() if not isinstance(value, bool)}
    form |= {"model": run.base_model_id, "data": run.data_id, "from_version": trained.pk}
    form["accepted_warnings"] = [
        warning_id
        for _, warning_id in client.post("/runs/new/summary", form).context["forecast"]["warnings"]
    ]
    answer = client.post("/runs/new", form)
    assert answer.status_code == 302, answer.context["error"]
    again = Run.objects.latest("pk")
    assert again.from_version == trained.pk
    assert json.loads((again.folder / "config.json").read_text())["start_weights"]


def test_a_version_of_others_is_none_to_begin_with(client, people, trained, base_model, data):
    client.force_login(people["mallory"])
    body = {"model": base_model.pk, "data": data.pk, "from_version": trained.pk}
    answer = client.post("/api/v1/runs/forecast", body, content_type="application/json")
    assert answer.status_code == 404


def test_another_base_model_or_rank_than_the_versions_is_refused_at_its_field(
    client, alice, trained, base_model, data
):
    client.force_login(alice)
    body = {"model": base_model.pk, "data": data.pk, "from_version": trained.pk}
    answer = client.post(
        "/api/v1/runs/forecast", body | {"settings": {"rank": 8}}, content_type="application/json"
    )
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "rank")


def test_what_the_weights_are_shaped_like_cannot_be_changed_on_the_way(alice, trained):
    with raises_user_error(ConfigError, field="rank", naming=(8, 4)):
        continue_training.continue_from(alice, trained, changes={"rank": 8})
    with pytest.raises(UserError, match="set by SnapML"):
        continue_training.continue_from(alice, trained, changes={"start_weights": "/etc"})
    assert Run.objects.count() == 1


def test_weights_of_another_shape_are_a_sentence_and_not_a_crash(tiny_run, engine_here, trained):
    run = tiny_run(rank=2, start_weights=str(trained.folder))
    assert engine_here([str(run)]) != 0
    assert "do not fit these settings" in read_result(run).message


def test_a_version_whose_data_is_gone_goes_on_with_other_data(alice, people, trained, data):
    AdapterVersion.objects.update(data=None)
    trained.refresh_from_db()
    with pytest.raises(Conflict, match="choose other data"):
        continue_training.continue_from(alice, trained)
    run = continue_training.continue_from(alice, trained, data=data)
    assert run.from_version == trained.pk
    assert json.loads((run.folder / "config.json").read_text())["start_weights"] == str(
        trained.folder
    )


def test_deleting_asks_for_the_name_refuses_what_is_deployed_and_frees_the_disk(
    alice, people, trained
):
    deployed = serving_services.create_deployment(alice, "lights", Routing(trained))
    with pytest.raises(UserError, match="Type the name Lights v1"):
        actions.delete_version(alice, trained, "Lights")
    with raises_user_error(Conflict, naming=("Lights v1", "lights")):
        actions.delete_version(alice, trained, "Lights v1")
    deployed.delete()
    trained.merged_folder.mkdir(parents=True)
    (trained.merged_folder / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(NotAllowed):
        actions.delete_version(people["mallory"], trained, "Lights v1")
    folder, merged = trained.folder, trained.merged_folder
    assert actions.delete_version(alice, trained, "Lights v1") > 1000
    assert not folder.exists()
    assert not merged.exists()
    assert not Job.objects.exists()


def test_tags_and_notes_are_checked_as_a_runs_are(alice, people, run):
    version = register_version(run)
    actions.update_version(alice, version, tags="candidate, production", notes="ok")
    assert version.tag_list == ["candidate", "production"]
    with pytest.raises(UserError, match="odd characters"):
        actions.update_version(alice, version, tags="<b>")
    with pytest.raises(NotAllowed):
        actions.update_version(people["bob"], version, tags="x")


def test_the_lineage_shows_only_what_one_may_see(alice, people, run):
    parent = register_version(run, number=1)
    child = register_version(run, number=2, parent=parent)
    hidden = register_version(run, number=3, parent=child)
    AdapterVersion.objects.filter(pk=hidden.pk).update(owner=people["mallory"], team=None)
    assert [one.version.number for one in actions.build_lineage(alice, child)] == [1, 2]


def test_disk_use_is_told_by_owner_adapter_and_run(alice, people, run):
    version = register_version(run, weights=b"x" * 5000)
    usage = actions.get_disk_usage(alice)
    assert usage["adapters"] == [
        {
            "owner": "alice",
            "name": "Lights",
            "versions": 1,
            "bytes": version.size_bytes,
            "merged": 0,
        }
    ]
    assert usage["runs"][0]["bytes"] > 100
    assert usage["owners"][0]["bytes"] == version.size_bytes
    assert actions.get_disk_usage(people["mallory"])["adapters"] == []


def test_a_checkpoint_that_is_replaced_while_it_is_copied_says_so(alice, trained, monkeypatch):
    from training.runs.run_files import list_checkpoint_steps

    def fail_copy(source, *_args, **_kwargs):
        shutil.rmtree(source)
        raise shutil.Error([(str(source), "", "gone")])

    monkeypatch.setattr(shutil, "copytree", fail_copy)
    with pytest.raises(Conflict, match="replaced by a newer one"):
        registry_services.register_checkpoint(
            alice, trained.run, list_checkpoint_steps(trained.run)[0]
        )
    assert not list(trained.run.folder.glob(".shelf-*"))


def test_the_held_out_loss_of_a_checkpoints_step_is_its_own(alice, trained):
    from training.runs.run_files import list_checkpoint_steps

    run = trained.run
    step = list_checkpoint_steps(run)[0]
    with (run.folder / "events.jsonl").open("rb") as file:
        lines = [json.loads(line) for line in file]
    expected = [
        line["eval_loss"] for line in lines if line["kind"] == "eval" and line["step"] == step
    ]
    for line in lines:
        Event.objects.create(
            run=run,
            seq=line["seq"],
            kind=line["kind"],
            step=line.get("step"),
            time=line["time"],
            fields=line,
        )
    version = registry_services.register_checkpoint(alice, run, step)
    assert version.eval_loss == (expected[-1] if expected else None)


def test_the_number_of_a_deleted_version_is_not_given_again(trained, alice, run):
    actions.delete_version(alice, trained, str(trained))
    registry_services.register_run_result(trained.run, read_result(trained.run.folder))
    assert trained.run.versions.get().number == trained.number + 1


def test_a_version_is_offered_for_comparison_with_what_it_came_from_or_came_after(run):
    first, second = register_version(run), register_version(run, number=2)
    assert first.comparison_default is None
    assert second.comparison_default == first
    other = register_version(run, number=3, parent=first)
    assert other.comparison_default == first


def test_who_may_only_look_reads_who_can_merge_it(client, people, run):
    client.force_login(people["vera"])
    page = client.get(f"/adapters/{register_version(run).pk}").content.decode()
    assert "Its owner, alice, can merge it" in page
    assert "Push to a hub" not in page


def test_a_version_that_a_waiting_run_begins_with_is_not_deleted(alice, trained):
    run = continue_training.continue_from(alice, trained)
    with raises_user_error(Conflict, naming=(f"Run {run.pk}", "Lights v1")):
        actions.delete_version(alice, trained, "Lights v1")
    Run.objects.filter(pk=run.pk).update(state="stopped")
    actions.delete_version(alice, trained, "Lights v1")


def test_a_run_from_a_version_has_no_trials(alice, trained):
    with raises_user_error(ConfigError, field="tuning_budget_fraction", naming=("0.3",)):
        continue_training.continue_from(alice, trained, changes={"tuning_budget_fraction": 0.3})


def test_a_kept_checkpoint_cost_its_share_of_the_runs_time(trained):
    run, now = trained.run, timezone.now()
    Allocation.objects.filter(run_id=run.pk).delete()
    period = {"started_at": now - timedelta(seconds=100), "released_at": now}
    Allocation.objects.create(
        device=Device.objects.get(), run_id=run.pk, user=run.owner, reserved_bytes=1, **period
    )
    Run.objects.filter(pk=run.pk).update(step=10)
    run.refresh_from_db()
    assert build_provenance(run, 10)["device_seconds"] == pytest.approx(100)
    assert build_provenance(run, 4)["device_seconds"] == pytest.approx(40)
