"""A run as a YAML file: it is written, read back and launched again, and invalid files are
rejected.
"""

import io

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command

from tests import tiny
from tests.launching import launch_run
from tests.pages import normalize_markup
from tests.user_errors import raises_user_error
from training.engine.config import RunConfig
from training.errors import NotFound, UserError
from training.gpus import devices
from training.gpus.models import Pool
from training.runs.launch.auto import AutoRequest
from training.runs.launch.start_version import find_start_version
from training.runs.launch.yaml_file import (
    find_data,
    find_placement,
    read_yaml,
    to_launch_request,
    to_yaml,
)
from training.runs.models import Run, Sweep
from training.runs.queue.placement import Placement

pytestmark = pytest.mark.django_db


def test_a_written_file_reads_back_the_same(run, alice):
    document = read_yaml(to_yaml(run))
    assert document["settings"] == run.config
    assert document["model"] == run.base_model.name
    assert find_data(alice, document) == run.data


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("a: [", "", ["Line 1"]),
        ("- 1", "", ["mapping"]),
        ("modell: x", "", ["'modell'"]),
        ("settings: 3", "", ["`settings`"]),
        ("a: &x [1]\nb: *x", "yaml_alias", []),
        ("settings: {rank: !!bool x}", "yaml_tag", []),
        ("!!python/object/apply:os.system ['id']", "yaml_tag", []),
        ("x" * 70_000, "", ["64,000"]),
        ("[" * 10_000, "yaml_depth", []),
        ("settings: {rank: 4, rank: 8}", "", ["rank", "twice"]),
        ("settings: {learning_rate: .inf}", "number_out_of_range", ["learning_rate"]),
        ('name: "\\uDFFF"', "unstorable_text", ["name"]),
        ("skip_impossible: 1", "", ["skip_impossible"]),
    ],
)
def test_an_invalid_file_is_rejected(text, code, facts):
    with raises_user_error(code=code, field="file", naming=facts):
        read_yaml(text)


@pytest.mark.parametrize("scalar", ["0x10", "0b11", "0o17", "017", "1_6", "1:30", "2026-11-30"])
def test_a_number_that_readers_take_for_another_is_refused_as_text(scalar):
    settings = read_yaml(f"settings: {{rank: {scalar}}}")["settings"]
    with raises_user_error(field="rank", naming=[f"'{scalar}'"]):
        RunConfig.from_dict(settings)


@pytest.mark.parametrize("scalar", ["1e-3", "1E-3", "+1e-3", "0.001", ".001", "1.e-3"])
def test_decimal_numbers_are_read_with_and_without_exponent(scalar):
    assert read_yaml(f"settings: {{learning_rate: {scalar}}}")["settings"] == {
        "learning_rate": 0.001
    }


@pytest.mark.parametrize(
    "name", ["no", "1e5", "1.10", "0x1F", "007", "null", "2026-11-30", "a: #b"]
)
def test_a_name_is_read_and_written_as_it_is(run, name):
    run.name = name
    assert read_yaml(to_yaml(run))["name"] == name
    if name not in ("null", "a: #b"):
        document = read_yaml(f"name: {name}\ndata: {{name: {name}, sha256: {name}}}")
        assert (document["name"], document["data"]) == (name, {"name": name, "sha256": name})


def test_data_is_looked_up_by_digest_then_name_among_visible_data(run, alice, people):
    assert find_data(alice, {"data": {"name": "old name", "sha256": run.data.digest}}) == run.data
    assert find_data(alice, {"data": "Lights"}) == run.data
    for user, reference in (
        (people["mallory"], {"name": "Lights"}),
        (alice, {"name": "Lights", "version": 9}),
        (alice, None),
    ):
        with pytest.raises(NotFound):
            find_data(user, {"data": reference})


def test_the_file_is_downloaded_and_fills_the_launch_page(as_alice, run):
    answer = as_alice.get(f"/runs/{run.pk}/config.yaml")
    assert answer["Content-Disposition"] == f'attachment; filename="run-{run.pk}.yaml"'
    page = normalize_markup(
        as_alice.post("/runs/new/file", {"file": SimpleUploadedFile("r.yaml", answer.content)})
    )
    assert 'value="Lights, tiny"' in page
    assert '<input id="rank" name="rank" inputmode="decimal" autocomplete="off" value="4">' in page
    bad = as_alice.post(
        "/runs/new/file",
        {
            "file": SimpleUploadedFile(
                "r.yaml", b"settings: {rank: 0}\nmodel: tiny-llama\ndata: Lights"
            )
        },
    )
    assert "rank is 0" in bad.content.decode()


def test_the_command_starts_a_run_or_a_sweep(run, tmp_path, no_queue):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    with pytest.raises(CommandError, match=r"learning_rate is 0\.01"):
        call_command("launch", file, user="alice")
    out = io.StringIO()
    call_command("launch", file, user="alice", accept_warnings=True, stdout=out)
    assert "is queued" in out.getvalue()
    assert Run.objects.count() == 2
    file.write_text(
        "model: tiny-llama\ndata: Lights\nsettings: {rank: [2, 4], alpha: 4, max_length: 64, "
        "max_steps: 3, eval_steps: 1}"
    )
    call_command("launch", file, user="alice", stdout=out)
    assert Sweep.objects.get().runs.count() == 2
    with pytest.raises(CommandError, match="User zoe not found"):
        call_command("launch", file, user="zoe")


def test_a_copied_run_has_all_settings(as_alice, run):
    page = normalize_markup(as_alice.get(f"/runs/new?from={run.pk}"))
    for name in (
        "rank",
        "alpha",
        "max_steps",
        "max_tokens_per_batch",
        "max_length",
        "eval_steps",
        "save_steps",
    ):
        assert (
            f'name="{name}" inputmode="decimal" autocomplete="off" value="{run.config[name]}"'
            in page
        )
    assert "Lights, tiny (copy)" in page


def test_a_pool_and_priority_that_are_not_the_default_are_written(as_alice, alice, run, device):
    assert "pool" not in to_yaml(run)
    assert "priority" not in to_yaml(run)
    run.pool = Pool.objects.create(name="Attic", kind="NVIDIA Attic")
    run.priority = "background"
    document = read_yaml(to_yaml(run))
    assert find_placement(document) == Placement(run.pool, "background")
    file = SimpleUploadedFile("r.yaml", to_yaml(run).encode())
    page = normalize_markup(as_alice.post("/runs/new/file", {"file": file}))
    assert 'value="background" selected' in page


@pytest.mark.parametrize(
    ("document", "field"), [({"pool": "Cellar"}, "pool"), ({"priority": "at once"}, "priority")]
)
def test_an_unknown_pool_or_priority_is_rejected(device, document, field):
    with raises_user_error(field=field):
        find_placement(document)


def test_the_command_uses_the_priority_of_the_file(alice, run, device, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(run) + "priority: background\n")
    call_command("launch", str(file), user="alice", stdout=io.StringIO(), accept_warnings=True)
    assert Run.objects.latest("pk").priority == "background"


def relaunch_from_file(run, tmp_path, *options):
    """The runs that `manage.py launch` starts from the YAML file of a run."""
    file = tmp_path / f"{run.pk}.yaml"
    file.write_text(to_yaml(run))
    known = set(Run.objects.values_list("pk", flat=True))
    call_command(
        "launch",
        str(file),
        *options,
        user=run.owner.username,
        accept_warnings=True,
        stdout=io.StringIO(),
    )
    return list(Run.objects.exclude(pk__in=known).order_by("pk"))


def is_same_run(one, other):
    names = ("config", "base_model", "data", "pool", "priority", "start_version", "method")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_a_run_is_launched_again_from_its_file(run, tmp_path):
    (again,) = relaunch_from_file(run, tmp_path)
    assert is_same_run(again, run)


def test_a_run_of_a_sweep_is_launched_again_alone_or_as_a_sweep(
    alice, base_model, data, device, no_queue, tmp_path
):
    settings = {**tiny.SETTINGS, "rank": [2, 4]}
    sweep = launch_run(alice, base_model=base_model, data=data, settings=settings, name="Grid")
    first, second = sweep.runs.order_by("pk")
    (again,) = relaunch_from_file(second, tmp_path)
    assert is_same_run(again, second)
    assert again.sweep is None
    relaunched_sweep = relaunch_from_file(second, tmp_path, "--again")
    assert [run.config for run in relaunched_sweep] == [first.config, second.config]
    assert relaunched_sweep[0].sweep.name == "Grid"
    assert relaunched_sweep[0].sweep.grid == sweep.grid


def test_an_auto_run_is_launched_again_with_its_settings_or_a_new_plan(
    alice, base_model, data, counted, no_queue, tmp_path
):
    pool = Pool.objects.get(kind=devices.CPU)  # the default is the GPU's
    auto = AutoRequest("style", {"rank": 2})
    run = launch_run(alice, base_model=base_model, data=data, auto=auto, placement=Placement(pool))
    assert (run.pool, run.config["rank"]) == (pool, 2)
    (again,) = relaunch_from_file(run, tmp_path)
    assert is_same_run(again, run)
    assert again.auto_plan == {}
    (planned,) = relaunch_from_file(run, tmp_path, "--again")
    assert is_same_run(planned, run)
    assert planned.auto_plan == run.auto_plan
    assert planned.request == run.request


def test_the_page_loads_a_file_with_auto(as_alice, alice, base_model, data, counted, no_queue):
    text = b"model: tiny-llama\ndata: Lights\nauto: {goal: style, locked: {rank: 2}}\n"
    upload = {"file": SimpleUploadedFile("r.yaml", text)}
    as_alice.post(
        "/runs/new/memory",
        {
            "mode": "auto",
            "model": base_model.pk,
            "data": data.pk,
            "goal": "style",
            "set-rank": "2",
            "lock": "rank",
        },
    )
    page = as_alice.post("/runs/new/file", upload)
    assert page.status_code == 200
    plan = page.context["plan_state"].plan
    assert (plan.goal, plan.settings["rank"]) == ("style", 2)
    assert page.context["auto"] is True


@pytest.mark.parametrize("text", ["request: 3", "request: {run: 1}", "auto: {rank: 3}"])
def test_a_malformed_request_is_rejected(text):
    with pytest.raises(UserError) as refused:
        read_yaml(text)
    assert refused.value.field == "file"


@pytest.mark.parametrize("request_", [{}, {"name": "x"}, {"skip_impossible": True}])
def test_an_empty_request_is_not_launched_again(alice, run, request_):
    document = read_yaml(to_yaml(run)) | {"request": read_yaml("name: x")}
    document["request"] |= request_
    with pytest.raises(UserError) as refused:
        to_launch_request(alice, document, again=True)
    assert refused.value.field == "file"


def test_a_written_file_is_never_too_long_to_read(alice, base_model, data, device, no_queue):
    texts = [f"{number} " + "word " * 300 for number in range(12)]
    settings = {
        "method": "prompt",
        "prompt_tuning_init": "text",
        "prompt_tuning_init_text": texts,
        "max_steps": 2,
    }
    sweep = launch_run(alice, base_model=base_model, data=data, settings=settings)
    run = sweep.runs.first()
    assert read_yaml(to_yaml(run))["settings"] == run.config


@pytest.mark.parametrize("version", ["1", 1.0, True])
def test_the_version_of_start_weights_must_be_an_integer(alice, version):
    with pytest.raises(UserError) as refused:
        find_start_version(alice, {"name": "Lights", "version": version})
    assert refused.value.field == "start_version"


def test_the_page_rejects_a_lock_of_the_wrong_type(as_alice, run):
    text = b"model: tiny-llama\ndata: Lights\nauto: {locked: {gradient_checkpointing: 1}}\n"
    page = as_alice.post("/runs/new/file", {"file": SimpleUploadedFile("r.yaml", text)})
    assert page.context["error"].field == "gradient_checkpointing"
