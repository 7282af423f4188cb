"""A run as a file: out and in again to the same, by page, API and command; a file that is none gets
a sentence.
"""

import io

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command

from tests import tiny
from tests.launching import launch_run
from tests.pages import normalize_markup
from training.errors import NotFound, UserError
from training.gpus import devices
from training.gpus.models import Pool
from training.runs.launch.auto import AutoRequest
from training.runs.launch.init_from import find_start_weights
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


def test_it_comes_back_as_it_went(run, alice):
    document = read_yaml(to_yaml(run))
    assert document["settings"] == run.config
    assert document["model"] == run.base_model.name
    assert find_data(alice, document) == run.data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1: not YAML"),
        ("- 1", "must be a mapping"),
        ("modell: x", "There is no key 'modell'"),
        ("settings: 3", "`settings` must be a mapping"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("settings: {rank: !!bool x}", "tags"),
        ("!!python/object/apply:os.system ['id']", "tags"),
        ("x" * 70_000, "more than 16,000 characters"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_none_gets_a_sentence(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_yaml(text)


def test_data_is_found_by_content_before_name_and_never_that_of_strangers(run, alice, people):
    assert find_data(alice, {"data": {"name": "old name", "sha256": run.data.digest}}) == run.data
    assert find_data(alice, {"data": "Lights"}) == run.data
    for user, reference in (
        (people["mallory"], {"name": "Lights"}),
        (alice, {"name": "Lights", "version": 9}),
        (alice, None),
    ):
        with pytest.raises(NotFound):
            find_data(user, {"data": reference})


def test_the_page_hands_it_out_and_fills_itself_from_it(as_alice, run):
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
    with pytest.raises(CommandError, match="Above 0.005, the loss of LoRA"):
        call_command("launch", file, user="alice")
    out = io.StringIO()
    call_command("launch", file, user="alice", accept_warnings=True, stdout=out)
    assert "is waiting for a worker" in out.getvalue()
    assert Run.objects.count() == 2
    file.write_text(
        "model: tiny-llama\ndata: Lights\nsettings: {rank: [2, 4], alpha: 4, max_length: 64, "
        "max_steps: 3, eval_steps: 1}"
    )
    call_command("launch", file, user="alice", stdout=out)
    assert Sweep.objects.get().runs.count() == 2
    with pytest.raises(CommandError, match="There is nobody called zoe"):
        call_command("launch", file, user="zoe")


def test_new_from_this_run_copies_everything(as_alice, run):
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
    assert "Lights, tiny again" in page


def test_pool_and_class_come_back_where_they_are_not_the_usual_ones(as_alice, alice, run, device):
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
    ("more", "message"),
    [({"pool": "Cellar"}, "no pool of devices 'Cellar'"), ({"priority": "at once"}, "is one of")],
)
def test_a_pool_or_class_that_is_not_there_is_told(device, more, message):
    with pytest.raises(UserError, match=message):
        find_placement(more)


def test_the_command_starts_it_where_the_file_says(alice, run, device, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(run) + "priority: background\n")
    call_command("launch", str(file), user="alice", stdout=io.StringIO(), accept_warnings=True)
    assert Run.objects.latest("pk").priority == "background"


def relaunch_from_file(run, tmp_path, *options):
    """What `manage.py launch` starts from a run's own file."""
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
    names = ("config", "base_model", "data", "pool", "priority", "from_version", "method")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_a_plain_run_comes_back_from_its_file(run, tmp_path):
    (again,) = relaunch_from_file(run, tmp_path)
    assert is_same_run(again, run)


def test_a_run_of_a_sweep_comes_back_alone_or_with_the_whole_sweep(
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


def test_a_run_that_auto_planned_in_a_named_pool_comes_back_planned_or_as_it_was(
    alice, base_model, data, counted, no_queue, tmp_path
):
    pool = Pool.objects.get(kind=devices.CPU)  # the default one is the card's
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


def test_the_page_opens_a_file_that_lets_auto_choose(
    as_alice, alice, base_model, data, counted, no_queue
):
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
def test_a_request_of_another_form_gets_a_sentence(text):
    with pytest.raises(UserError) as refused:
        read_yaml(text)
    assert refused.value.field == "file"


@pytest.mark.parametrize("request_", [{}, {"name": "x"}, {"skip_impossible": True}])
def test_a_request_that_asks_for_nothing_is_not_launched_again(alice, run, request_):
    document = read_yaml(to_yaml(run)) | {"request": read_yaml("name: x")}
    document["request"] |= request_
    with pytest.raises(UserError) as refused:
        to_launch_request(alice, document, again=True)
    assert refused.value.field == "file"


def test_a_file_is_never_longer_than_what_is_read_back(alice, base_model, data, device, no_queue):
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
def test_a_version_to_begin_with_has_a_whole_number(alice, version):
    with pytest.raises(UserError) as refused:
        find_start_weights(alice, {"name": "Lights", "version": version})
    assert refused.value.field == "start_from"


def test_the_page_refuses_a_lock_of_the_wrong_type(as_alice, run):
    text = b"model: tiny-llama\ndata: Lights\nauto: {locked: {gradient_checkpointing: 1}}\n"
    page = as_alice.post("/runs/new/file", {"file": SimpleUploadedFile("r.yaml", text)})
    assert page.context["error"].field == "gradient_checkpointing"
