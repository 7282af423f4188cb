"""Adapter versions: registering, provenance, lineage, continued training, tags and deletion."""

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


def test_a_version_keeps_its_provenance(trained, data, base_model):
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


def test_any_saved_checkpoint_can_be_registered(alice, people, trained):
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


def test_a_run_continues_from_a_versions_weights(
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


def test_a_run_file_relaunches_from_the_same_start_weights(alice, people, trained, tmp_path):
    run = continue_training.continue_from(alice, trained, changes={"max_steps": 1})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    options = {"accept_warnings": True, "stdout": io.StringIO()}
    call_command("launch", str(file), user="alice", **options)
    again = Run.objects.latest("pk")
    assert (again.start_version, again.config, again.request) == (
        trained.pk,
        run.config,
        run.request,
    )
    config = json.loads((again.folder / "config.json").read_text())
    assert config["init_from"] == str(trained.folder)
    with pytest.raises(CommandError, match="'Others', version 1"):
        file.write_text(to_yaml(run).replace("Lights", "Others").replace(trained.sha256, "0" * 64))
        call_command("launch", str(file), user="alice", **options)
    assert Run.objects.count() == 3


def test_a_copy_of_a_run_has_the_same_start_weights(client, alice, trained):
    client.force_login(alice)
    run = continue_training.continue_from(alice, trained)
    page = client.get(f"/runs/new?from={run.pk}")
    assert page.context["start_version"].version == trained.pk
    assert f'name="start_version" value="{trained.pk}" checked' in page.content.decode()
    form = {name: str(value) for name, value in run.config.items() if not isinstance(value, bool)}
    form |= {"model": run.base_model_id, "data": run.data_id, "start_version": trained.pk}
    form["accepted_warnings"] = [
        warning_id
        for _, warning_id in client.post("/runs/new/summary", form).context["forecast"]["warnings"]
    ]
    answer = client.post("/runs/new", form)
    assert answer.status_code == 302, answer.context["error"]
    again = Run.objects.latest("pk")
    assert again.start_version == trained.pk
    assert json.loads((again.folder / "config.json").read_text())["init_from"]


def test_a_run_cannot_start_from_a_version_the_user_cannot_see(
    client, people, trained, base_model, data
):
    client.force_login(people["mallory"])
    body = {"model": base_model.pk, "data": data.pk, "start_version": trained.pk}
    answer = client.post("/api/v1/runs/forecast", body, content_type="application/json")
    assert answer.status_code == 404


def test_a_rank_that_differs_from_the_versions_is_rejected_at_its_field(
    client, alice, trained, base_model, data
):
    client.force_login(alice)
    body = {"model": base_model.pk, "data": data.pk, "start_version": trained.pk}
    answer = client.post(
        "/api/v1/runs/forecast", body | {"settings": {"rank": 8}}, content_type="application/json"
    )
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "rank")


def test_continued_training_cannot_change_the_shape_of_the_weights(alice, trained):
    with raises_user_error(ConfigError, field="rank", naming=(8, 4)):
        continue_training.continue_from(alice, trained, changes={"rank": 8})
    with pytest.raises(UserError, match="set by SnapML"):
        continue_training.continue_from(alice, trained, changes={"init_from": "/etc"})
    assert Run.objects.count() == 1


def test_start_weights_of_another_shape_fail_with_a_message(tiny_run, engine_here, trained):
    run = tiny_run(rank=2, init_from=str(trained.folder))
    assert engine_here([str(run)]) != 0
    assert "do not match these settings" in read_result(run).message


def test_a_version_without_data_continues_with_other_data(alice, people, trained, data):
    AdapterVersion.objects.update(data=None)
    trained.refresh_from_db()
    with raises_user_error(Conflict, field="data"):
        continue_training.continue_from(alice, trained)
    run = continue_training.continue_from(alice, trained, data=data)
    assert run.start_version == trained.pk
    assert json.loads((run.folder / "config.json").read_text())["init_from"] == str(trained.folder)


def test_deleting_needs_the_name_and_no_deployment_and_frees_disk_space(alice, people, trained):
    deployed = serving_services.create_deployment(alice, "lights", Routing(trained))
    with raises_user_error(field="name", naming=("Lights v1",)):
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


def test_tags_and_notes_are_checked_like_those_of_runs(alice, people, run):
    version = register_version(run)
    actions.update_version(alice, version, tags="candidate, production", notes="ok")
    assert version.tag_list == ["candidate", "production"]
    with pytest.raises(UserError, match="<b>"):
        actions.update_version(alice, version, tags="<b>")
    with pytest.raises(NotAllowed):
        actions.update_version(people["bob"], version, tags="x")


def test_the_lineage_has_only_visible_versions(alice, people, run):
    parent = register_version(run, number=1)
    child = register_version(run, number=2, parent=parent)
    hidden = register_version(run, number=3, parent=child)
    AdapterVersion.objects.filter(pk=hidden.pk).update(owner=people["mallory"], team=None)
    assert [one.version.number for one in actions.build_lineage(alice, child)] == [1, 2]


def test_a_checkpoint_that_is_replaced_while_it_is_copied_is_a_conflict(
    alice, trained, monkeypatch
):
    from training.runs.run_files import list_checkpoint_steps

    def fail_copy(source, *_args, **_kwargs):
        shutil.rmtree(source)
        raise shutil.Error([(str(source), "", "gone")])

    monkeypatch.setattr(shutil, "copytree", fail_copy)
    with raises_user_error(Conflict, field="step"):
        registry_services.register_checkpoint(
            alice, trained.run, list_checkpoint_steps(trained.run)[0]
        )
    assert not list(trained.run.folder.glob(".register-*"))


def test_a_checkpoint_gets_the_eval_loss_of_its_step(alice, trained):
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


def test_the_number_of_a_deleted_version_is_not_reused(trained, alice, run):
    actions.delete_version(alice, trained, str(trained))
    registry_services.register_run_result(trained.run, read_result(trained.run.folder))
    assert trained.run.versions.get().number == trained.number + 1


def test_a_version_is_compared_with_its_parent_or_predecessor_by_default(run):
    first, second = register_version(run), register_version(run, number=2)
    assert first.comparison_default is None
    assert second.comparison_default == first
    other = register_version(run, number=3, parent=first)
    assert other.comparison_default == first


def test_a_viewer_sees_who_can_merge_the_version(client, people, run):
    client.force_login(people["vera"])
    page = client.get(f"/adapters/{register_version(run).pk}").content.decode()
    assert "The owner, alice, a lead of the team" in page
    assert "Push to Hugging Face Hub" not in page


def test_a_version_that_a_queued_run_starts_from_cannot_be_deleted(alice, trained):
    run = continue_training.continue_from(alice, trained)
    with raises_user_error(Conflict, naming=(f"Run {run.pk}", "Lights v1")):
        actions.delete_version(alice, trained, "Lights v1")
    Run.objects.filter(pk=run.pk).update(state="stopped")
    actions.delete_version(alice, trained, "Lights v1")


def test_a_run_from_a_version_has_no_trials(alice, trained):
    with raises_user_error(ConfigError, field="tuning_budget_fraction", naming=("0.3",)):
        continue_training.continue_from(alice, trained, changes={"tuning_budget_fraction": 0.3})


def test_a_checkpoint_gets_its_share_of_the_device_time(trained):
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


def test_the_api_filters_versions_by_run(as_alice, run):
    version = register_version(run)
    other = register_version(run, number=2)
    AdapterVersion.objects.filter(pk=other.pk).update(run=None)  # its run was deleted
    listed = as_alice.get(f"/api/v1/adapters?run={run.pk}").json()["items"]
    assert [one["id"] for one in listed] == [version.pk]
    assert len(as_alice.get("/api/v1/adapters").json()["items"]) == 2
    assert as_alice.get("/api/v1/adapters?run=-1").status_code == 422
