"""The same launch request gives the same plan, warnings and forecast on the page, in the API and by
command, and launches exactly that.
"""

import io
import json
from pathlib import Path

import pytest
import yaml
from django.core.management import CommandError, call_command
from django.urls import reverse

from tests import tiny
from tests.launching import launch_run
from tests.user_errors import raises_user_error
from training.datasets.upload_job import create_dataset
from training.errors import ConfigError, Conflict, UserError
from training.gpus import devices
from training.gpus.models import PersonalQuota, Pool
from training.runs.forecast.memory_estimators import CannotEstimate
from training.runs.forecast.token_lengths import get_lengths
from training.runs.launch.auto import AutoRequest
from training.runs.launch.request import LaunchRequest, launch_runs, preview_launch
from training.runs.launch.services import WarningsNotAccepted
from training.runs.launch.yaml_file import to_yaml
from training.runs.models import Run, Sweep

pytestmark = pytest.mark.django_db
JUMPY = {"learning_rate": 0.9}  # above LoRA's recommended range


@pytest.fixture
def named_pool():
    """A pool other than the default, which is the GPU's."""
    return Pool.objects.get(kind=devices.CPU)


def forecast_by_api(client, body):
    answer = client.post("/api/v1/runs/forecast", body, content_type="application/json")
    assert answer.status_code == 200, answer.content
    return answer.json()


def launch_by_command(tmp_path, text, *options):
    file, out = tmp_path / "run.yaml", io.StringIO()
    file.write_text(text)
    call_command("launch", str(file), "--user", "alice", *options, stdout=out)
    return out.getvalue()


def render_summary(client, form):
    return client.post(reverse("run-summary"), form).content.decode()


def test_page_api_command_and_launch_have_the_same_warnings_for_a_sweep(
    as_alice, base_model, counted, tmp_path
):
    settings = {**tiny.SETTINGS, "learning_rate": [0.001, 0.9]}
    body = {"model": base_model.pk, "data": counted.pk, "settings": settings}
    forecast = forecast_by_api(as_alice, body)
    assert forecast["runs"] == 2
    warnings = forecast["forecast"]["warnings"]
    assert any("0.9" in warning for warning in warnings)
    refused = as_alice.post("/api/v1/runs/sweeps", body, content_type="application/json")
    assert refused.status_code == 409
    assert all(warning in refused.json()["error"]["message"] for warning in warnings)
    text = yaml.safe_dump({"model": "tiny-llama", "data": "Lights", "settings": settings})
    output = launch_by_command(tmp_path, text, "--forecast")
    assert [line[9:] for line in output.splitlines() if line.startswith("warning: ")] == warnings
    form = {"mode": "manual", "model": base_model.pk, "data": counted.pk, **tiny.SETTINGS}
    page = render_summary(as_alice, form | {"learning_rate": "0.001, 0.9"})
    assert page.count('name="accepted_warnings"') == len(warnings)
    assert not Run.objects.exists()


def test_page_api_and_command_make_the_same_auto_plan(
    as_alice, alice, base_model, counted, named_pool, tmp_path
):
    auto = {"goal": "style", "locked": {"rank": 2}}
    body = {"model": base_model.pk, "data": counted.pk, "auto": auto, "pool": named_pool.pk}
    forecast = forecast_by_api(as_alice, body)
    assert forecast["plan"]["settings"]["rank"] == 2
    form = {"mode": "auto", "model": base_model.pk, "data": counted.pk, "goal": "style"}
    form |= {"pool": named_pool.pk, "set-rank": "2", "lock": "rank"}
    as_alice.post(reverse("run-memory"), form)
    assert f'name="plan_digest" value="{forecast["plan_digest"]}"' in render_summary(as_alice, form)
    text = yaml.safe_dump(
        {"model": "tiny-llama", "data": "Lights", "pool": named_pool.name, "auto": auto}
    )
    output = launch_by_command(tmp_path, text, "--forecast")
    for choice in forecast["plan"]["choices"]:
        assert f"{choice['setting']} = " in output
    created = as_alice.post("/api/v1/runs", body, content_type="application/json").json()
    launch_by_command(tmp_path, text, "--accept-warnings")
    by_command_, by_api_ = Run.objects.order_by("-pk")[:2]
    assert created["id"] == by_api_.pk
    assert by_command_.config == by_api_.config
    assert by_command_.pool == by_api_.pool == named_pool
    assert by_command_.forecast == by_api_.forecast


def test_a_plan_is_made_for_the_pool_of_the_run(alice, base_model, counted, named_pool):
    request = LaunchRequest(user=alice, base_model=base_model, data=counted, auto=AutoRequest())
    in_default_pool = preview_launch(request)
    in_named_pool = preview_launch(
        LaunchRequest(**{**vars(request), "placement": make_placement(named_pool)})
    )
    assert in_default_pool.plan.facts["device"] != in_named_pool.plan.facts["device"]
    run = launch_run(
        alice,
        base_model=base_model,
        data=counted,
        auto=AutoRequest(),
        placement=make_placement(named_pool),
    )
    assert run.auto_plan["facts"]["device"] == in_named_pool.plan.facts["device"]


def make_placement(pool):
    from training.runs.queue.placement import Placement

    return Placement(pool)


def test_a_plan_that_differs_from_the_reviewed_one_is_not_started(alice, base_model, counted):
    request = LaunchRequest(
        user=alice, base_model=base_model, data=counted, auto=AutoRequest(), plan_digest="other"
    )
    with pytest.raises(Conflict) as refused:
        launch_runs(request, accept_warnings=True)
    assert refused.value.field == "plan_digest"
    assert not Run.objects.exists()


def test_a_sweep_with_auto_is_rejected_and_starts_nothing(as_alice, base_model, counted):
    body = {"model": base_model.pk, "data": counted.pk, "auto": {"goal": "task"}}
    answer = as_alice.post("/api/v1/runs/sweeps", body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "auto"
    assert not Sweep.objects.exists()


def test_only_the_accepted_warnings_are_accepted(alice, base_model, counted):
    from training.runs.launch.sweep import compute_warning_id

    request = LaunchRequest(
        user=alice, base_model=base_model, data=counted, settings={**tiny.SETTINGS, **JUMPY}
    )
    with pytest.raises(WarningsNotAccepted) as refused:
        launch_runs(request, accepted_warnings=["something else"])
    accepted = [compute_warning_id(warning) for warning in refused.value.warnings]
    assert isinstance(launch_runs(request, accepted_warnings=accepted), Run)


def test_a_run_and_its_config_file_are_stored_completely(
    alice, base_model, counted, no_queue, django_assert_max_num_queries
):
    run = launch_run(alice, base_model=base_model, data=counted, auto=AutoRequest())
    stored = Run.objects.get(pk=run.pk)
    assert (stored.auto_plan, stored.request) == (run.auto_plan, run.request)
    config = json.loads((run.folder / "config.json").read_text())
    assert {name: config[name] for name in run.config} == run.config


def test_an_unsupported_method_rejects_a_sweep_unless_it_is_skipped(
    alice, base_model, counted, monkeypatch
):
    from training.runs.launch import request as module

    def fail_for_qlora(config, *_more):
        if config.method == "qlora":
            raise CannotEstimate("QLoRA cannot quantize this model.", field="method")
        return {}

    monkeypatch.setattr(module, "get_cached_forecast", fail_for_qlora)
    settings = {"method": ["lora", "qlora"], "max_steps": 3}
    launch_fields = {"base_model": base_model, "data": counted, "settings": settings}
    with pytest.raises(UserError):
        launch_run(alice, **launch_fields)
    assert not Run.objects.exists()
    sweep = launch_run(alice, **launch_fields, skip_impossible=True)
    assert [run.method for run in sweep.runs.all()] == ["lora"]
    assert list(sweep.impossible) == ["QLoRA"]


def test_a_sweep_above_the_queue_limit_starts_nothing_and_leaves_no_folder(
    alice, base_model, data, device, no_queue, settings
):
    PersonalQuota.objects.create(user=alice, max_queued=2)
    runs = Path(settings.HOME) / "runs"
    before = set(runs.glob("*/config.json"))
    with pytest.raises(Conflict):
        launch_run(alice, base_model=base_model, data=data, settings={"seed": [1, 2, 3]})
    assert not Run.objects.exists()
    assert set(runs.glob("*/config.json")) == before


def test_duplicate_values_are_stored_once(alice, base_model, data, device, no_queue):
    settings = {**tiny.SETTINGS, "seed": [1, 2] + [1] * 1000}
    sweep = launch_run(alice, base_model=base_model, data=data, settings=settings)
    assert sweep.runs.first().request["settings"]["seed"] == [1, 2]


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
def test_a_text_that_no_database_stores_is_rejected_at_its_setting(alice, base_model, data, text):
    settings = {"method": "prompt", "prompt_tuning_init": "text", "prompt_tuning_init_text": text}
    with pytest.raises(ConfigError) as refused:
        launch_run(alice, base_model=base_model, data=data, settings=settings)
    assert refused.value.field == "prompt_tuning_init_text"


def test_a_plan_digest_without_auto_is_rejected(alice, base_model, data):
    with pytest.raises(UserError) as refused:
        launch_run(alice, base_model=base_model, data=data, plan_digest="x")
    assert refused.value.field == "plan_digest"


STRICT_TEMPLATE = (
    "{% for message in messages %}{% if 'forbidden' in message['content'] %}"
    "{{ raise_exception('this word is not allowed') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def strict_model(base_model, tmp_path):
    """A model whose chat template rejects a row with the word `forbidden`."""
    base_model.location = str(tiny.make_model(tmp_path / "strict", template=STRICT_TEMPLATE))
    base_model.save()
    return base_model


def test_invalid_rows_are_left_out_on_request(alice, strict_model, device, preview_here, no_queue):
    rows = [{"prompt": f"p {number}", "completion": "one two"} for number in range(9)]
    odd_row = {"prompt": "a forbidden word", "completion": "no", "split": "train"}
    data = create_dataset(alice, "Words", tiny.encode_jsonl([*rows, odd_row]), source="x")
    settings = {**tiny.SETTINGS, "skip_invalid_rows": True}
    request = LaunchRequest(user=alice, base_model=strict_model, data=data, settings=settings)
    with pytest.raises(WarningsNotAccepted) as refused:
        launch_runs(request)
    assert any("1 of " in warning and "left out" in warning for warning in refused.value.warnings)
    run = launch_run(alice, base_model=strict_model, data=data, settings=settings)
    assert run.config["skip_invalid_rows"] and "skip_invalid_rows: true" in to_yaml(run)


def test_excluded_rows_need_not_fit_the_model(alice, strict_model, device, preview_here, no_queue):
    rows = [{"prompt": f"p {number}", "completion": "one two"} for number in range(9)]
    odd_rows = [
        {"prompt": f"forbidden {split}", "completion": "no", "split": split}
        for split in ("train", "valid")
    ]
    data = create_dataset(alice, "Words", tiny.encode_jsonl([*odd_rows, *rows]), source="x")
    settings = {**tiny.SETTINGS, "excluded_rows": "1"}
    with raises_user_error(code="data_unfit", naming=("held-out",)):
        launch_run(alice, base_model=strict_model, data=data, settings=settings)
    settings["excluded_eval_rows"] = "1"
    run = launch_run(alice, base_model=strict_model, data=data, settings=settings)
    assert yaml.safe_load(to_yaml(run))["settings"]["excluded_rows"] == "1"


@pytest.fixture
def words_data(alice):
    """Nine training rows, of which the first does not fit the strict model, and two held-out ones,
    of which the second does not.
    """
    rows = [
        {
            "prompt": f"{'forbidden' if index in (0, 10) else 'word'} {index}",
            "completion": "one two",
        }
        | {"split": "train" if index < 9 else "valid"}
        for index in range(11)
    ]
    return create_dataset(alice, "Words", tiny.encode_jsonl(rows), source="x")


def test_held_out_rows_that_the_run_does_not_read_may_be_invalid(
    alice, strict_model, device, preview_here, no_queue, words_data
):
    settings = {**tiny.SETTINGS, "excluded_rows": "1", "eval_rows": 1}
    assert launch_run(alice, base_model=strict_model, data=words_data, settings=settings)
    with raises_user_error(code="rows_unfit", naming=("held-out",)):
        launch_run(
            alice,
            base_model=strict_model,
            data=words_data,
            settings=settings | {"eval_rows": 2},
        )


def test_excluded_rows_are_not_counted_or_warned_about(
    alice, strict_model, device, preview_here, no_queue, words_data
):
    settings = {
        **tiny.SETTINGS,
        "learning_rate": 0.001,
        "excluded_rows": "1-3",
        "excluded_eval_rows": "2",
    }
    request = LaunchRequest(user=alice, base_model=strict_model, data=words_data, settings=settings)
    launch_runs(request)  # without a warning
    preview = preview_launch(request)
    assert preview.forecast["lengths"]["rows"] == 6
    assert not any("no trained token" in warning for warning in preview.forecast["warnings"])


@pytest.mark.parametrize(
    ("name", "text"),
    [("excluded_rows", "1-9"), ("excluded_rows", "10"), ("excluded_eval_rows", "1, 3")],
)
def test_excluded_rows_that_cannot_be_meant_are_refused(
    alice, strict_model, device, preview_here, no_queue, words_data, name, text
):
    settings = {**tiny.SETTINGS, name: text}
    with raises_user_error(field=name):
        launch_run(alice, base_model=strict_model, data=words_data, settings=settings)


@pytest.mark.parametrize(
    "locked",
    [
        {"skip_invalid_rows": True},
        {"excluded_rows": "1", "excluded_eval_rows": "2"},
    ],
    ids=str,
)
def test_auto_plans_without_the_rows_that_are_left_out(
    alice, strict_model, device, preview_here, no_queue, words_data, locked
):
    auto = AutoRequest(locked=locked | {"max_length": 64, "max_steps": 2})
    run = launch_run(alice, base_model=strict_model, data=words_data, auto=auto)
    assert {name: run.config[name] for name in locked} == locked
    with raises_user_error(field="excluded_rows"):
        all_rows = AutoRequest(locked={"excluded_rows": "1-9"})
        launch_run(alice, base_model=strict_model, data=words_data, auto=all_rows)


def test_auto_offers_to_leave_out_invalid_rows(
    as_alice, strict_model, device, preview_here, no_queue, words_data
):
    get_lengths(words_data, strict_model)
    form = {"mode": "auto", "model": strict_model.pk, "data": words_data.pk}
    summary = as_alice.post("/runs/new/summary", form).content.decode()
    assert 'id="plan"' in summary and 'value="skip_invalid_rows"' in summary


def test_plain_text_with_control_tokens_is_reported_before_a_run(
    alice, strict_model, device, preview_here, no_queue
):
    rows = [{"text": f"line {number}<|im_end|> and more"} for number in range(9)]
    data = create_dataset(alice, "Rendered", tiny.encode_jsonl(rows), source="x")
    request = LaunchRequest(user=alice, base_model=strict_model, data=data, settings=tiny.SETTINGS)
    with pytest.raises(WarningsNotAccepted) as refused:
        launch_runs(request)
    assert any("special tokens" in warning for warning in refused.value.warnings)


@pytest.mark.parametrize(
    ("split", "max_length", "code", "field"),
    [
        ("train", 80, "rows_unfit", "data"),
        ("valid", 80, "rows_unfit", "data"),
        ("", 8, "no_trained_tokens", "max_length"),
    ],
)
def test_accepted_warnings_never_skip_a_refusal(
    as_alice, alice, strict_model, device, preview_here, tmp_path, split, max_length, code, field
):
    settings = {**tiny.SETTINGS, "max_length": max_length, "eval_rows": 9}
    word = "forbidden" if split else "allowed"
    odd_row = {"prompt": f"a {word} word", "completion": "no", "split": split}
    rows = [
        {"prompt": f"{name} {number}", "completion": "one two", "split": name}
        for name in ("train", "valid")
        for number in range(4)
    ]
    data = create_dataset(alice, "Words", tiny.encode_jsonl([*rows, odd_row]), source="x")
    body = {"model": strict_model.pk, "data": data.pk, "settings": settings}
    with raises_user_error(code=code, field=field):
        launch_run(alice, base_model=strict_model, data=data, settings=settings)
    for path in ("/api/v1/runs", "/api/v1/runs/sweeps"):
        answer = as_alice.post(
            path, body | {"accept_warnings": True}, content_type="application/json"
        )
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    text = yaml.safe_dump({"model": strict_model.name, "data": "Words", "settings": settings})
    with pytest.raises(CommandError):
        launch_by_command(tmp_path, text, "--accept-warnings")
    form = {"mode": "manual", "model": strict_model.pk, "data": data.pk, **settings}
    page = as_alice.post(reverse("run-new"), form)
    assert page.status_code == 400
    assert b'name="accepted_warnings"' not in page.content
    assert not Run.objects.exists()


def test_a_sweep_skips_the_members_that_have_no_trained_token(
    alice, base_model, data, device, no_queue, preview_here
):
    settings = {**tiny.SETTINGS, "max_length": [8, 80]}
    sweep = launch_run(
        alice, base_model=base_model, data=data, settings=settings, skip_impossible=True
    )
    assert list(sweep.impossible) == ["max_length 8"]
    assert sweep.runs.count() == 1
