"""What will be trained: token previews, token lengths, and a forecast that agrees with the
training.
"""

import inspect
import json
import re
import shutil

import pytest

from tests import tiny
from tests.launching import launch_run
from tests.user_errors import raises_user_error
from training.datasets.upload_job import create_dataset
from training.engine import batches
from training.engine.config import RunConfig
from training.errors import NotAllowed, UserError
from training.runs.forecast.batch_shapes import BATCH_SETTINGS
from training.runs.forecast.summary import forecast_run
from training.runs.forecast.target_device import get_target_device
from training.runs.forecast.token_lengths import (
    build_histogram,
    compute_padding,
    get_lengths,
    get_truncation_stats,
    preview_tokens,
)

pytestmark = [pytest.mark.django_db, pytest.mark.once]


@pytest.fixture(autouse=True)
def preview_here_unless_marked(request):
    if not request.node.get_closest_marker("own_process"):
        request.getfixturevalue("preview_here")


@pytest.fixture(autouse=True)
def nothing_measured_yet(data):
    """Equal content shares a folder, so remove the lengths that another test measured."""
    shutil.rmtree(data.split_path("train").parent / "lengths", ignore_errors=True)


def join_tokens(row, kind):
    return "".join("".join(piece["tokens"]) for piece in row["spans"] if piece["kind"] == kind)


@pytest.mark.own_process
def test_tokens_are_trained_masked_or_truncated(base_model):
    preview = preview_tokens(base_model, tiny.ROWS[:1], max_length=20, train_on_prompt=False)
    row = preview["rows"][0]
    assert preview["template"] == "model"
    assert (
        join_tokens(row, "m")
        == "<|im_start|>user\nturn on the kitchen lamp<|im_end|>\n<|im_start|>assistant\n"
    )
    assert join_tokens(row, "t").startswith('{"intent"')
    assert join_tokens(row, "c").endswith("<|im_end|>\n")
    assert sum(len(piece["tokens"]) for piece in row["spans"]) == row["tokens"]


def test_characters_of_several_tokens_stay_whole_in_plain_text(base_model):
    row = preview_tokens(base_model, [{"text": "hé 😀 ok"}], max_length=99, train_on_prompt=False)[
        "rows"
    ][0]
    assert join_tokens(row, "m") + join_tokens(row, "t") == "hé 😀 ok<|im_end|>"


def test_a_row_that_the_template_cannot_render_has_a_problem(base_model):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "lamp", "arguments": {}}}],
    }
    row = preview_tokens(
        base_model,
        [{"messages": [{"role": "user", "content": "a"}, call]}],
        max_length=99,
        train_on_prompt=False,
    )["rows"][0]
    assert "tool call `lamp` (message 2)" in row["problem"]


@pytest.mark.own_process
def test_an_endless_template_is_an_error(base_model, tmp_path, monkeypatch, settings):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    folder = tiny.make_model(tmp_path / "endless", template=loop)
    base_model.location = str(folder)
    monkeypatch.setattr("training.runs.forecast.token_lengths.TIMEOUT_SECONDS", 8)
    with raises_user_error(field="model"):
        preview_tokens(base_model, tiny.ROWS[:1], max_length=99, train_on_prompt=False)


@pytest.mark.own_process
def test_the_forecast_agrees_with_the_training(data, base_model, alice, engine_here):
    """Compare steps, rows, tokens and trainable parameters with the events of the engine."""
    from tests.launching import launch_run

    settings = {
        **tiny.SETTINGS,
        "max_steps": 0,
        "epochs": 2,
        "max_length": 30,
        "max_tokens_per_batch": 100,
    }
    lengths = get_lengths(data, base_model)
    summary = forecast_run(
        RunConfig.from_dict(settings), base_model, data, lengths, get_target_device()
    )
    run = launch_run(alice, base_model=base_model, data=data, settings=settings)
    engine_here([str(run.folder)])
    events = tiny.read_events(run.folder)
    start = next(e for e in events if e["kind"] == "start")
    assert summary["steps"] == start["total_steps"]
    assert summary["trainable"] == start["trainable_parameters"]
    assert summary["lengths"]["truncated"] == start["truncated_rows"]
    assert summary["lengths"]["empty"] == start["empty_rows"]
    assert summary["tokens"] == sum(e["tokens"] for e in events if e["kind"] == "step")
    assert summary["evals"] == sum(e["kind"] == "eval" for e in events)


def test_lengths_are_measured_once(data, base_model, monkeypatch):
    first = get_lengths(data, base_model)
    monkeypatch.setattr("training.runs.forecast.token_lengths.run_preview", None)
    again = get_lengths(data, base_model)
    assert (again.total == first.total).all()


def test_a_large_data_set_is_measured_in_part(data, base_model, monkeypatch, as_alice):
    monkeypatch.setattr("training.runs.forecast.token_lengths.MAX_MEASURED_ROWS", 10)
    lengths = get_lengths(data, base_model)
    assert lengths.measured_rows < lengths.rows == data.train_rows
    assert not forecast_run(
        RunConfig(max_length=64), base_model, data, lengths, get_target_device()
    )["exact"]
    page = as_alice.get(f"/data/versions/{data.pk}/trained").content.decode()
    assert f"Measured on {lengths.measured_rows} of {data.train_rows}" in page


def test_truncation_padding_and_histogram_agree(data, base_model):
    lengths = get_lengths(data, base_model)
    facts = get_truncation_stats(lengths, 25)
    assert 0 < facts["truncated"] <= lengths.rows
    assert facts["longest"] == lengths.total.max()
    shares = compute_padding(lengths, RunConfig(max_length=64, max_tokens_per_batch=128))
    assert shares["ours"] < shares["random"]
    bars = build_histogram(lengths)
    assert sum(bars["total"]) == sum(bars["prompt"]) == sum(bars["answer"]) == lengths.measured_rows


def test_the_page_shows_token_spans_and_the_template(as_alice, data, base_model):
    page = as_alice.get(f"/data/versions/{data.pk}/trained?length=128").content.decode()
    assert '<span class="t">' in page
    assert '<span class="m">' in page
    assert "Uses the model's chat template" in page
    assert "padding" in page


def test_a_model_without_a_chat_template_uses_the_default(tmp_path, as_alice, data, base_model):
    folder = tiny.make_model(tmp_path / "bare", template=None)
    base_model.location = str(folder)
    base_model.save()
    assert (
        "has no chat template" in as_alice.get(f"/data/versions/{data.pk}/trained").content.decode()
    )


def test_rows_with_markup_are_shown_as_text(as_alice, alice, base_model):
    rows = [tiny.make_row(f"<script>alert({i})</script>", "<b>x</b>") for i in range(3)]
    version = create_dataset(alice, "Sly", tiny.encode_jsonl(rows), source="x")
    page = as_alice.get(f"/data/versions/{version.pk}/trained").content.decode()
    assert "<script>alert" not in page
    assert "<b>x" not in page


def test_the_summary_shows_steps_after_the_lengths_are_measured(as_alice, data, base_model):
    chosen = {
        "model": base_model.pk,
        "data": data.pk,
        "max_length": "64",
        "max_tokens_per_batch": "128",
    }
    assert "counting tokens" in as_alice.post("/runs/new/summary", chosen).content.decode()
    answer = as_alice.get(f"/runs/new/measured?model={base_model.pk}&data={data.pk}")
    assert (answer.status_code, answer["HX-Trigger"]) == (204, "measured")
    summary = as_alice.post("/runs/new/summary", chosen).content.decode()
    assert "counting tokens" not in summary
    assert "128 tokens per step" in summary


@pytest.mark.parametrize(
    ("form_data", "label"),
    [
        ({}, "Choose model and data"),
        ({"model": "M"}, "Choose data"),
        ({"model": "M", "data": "D", "rank": "0"}, "Fix Rank"),
        ({"model": "M", "data": "D", "max_length": "64"}, "Start run"),
        ({"model": "M", "data": "D", "max_length": "64", "learning_rate": "0.1"}, "Start anyway"),
    ],
)
def test_the_button_names_the_next_missing_input(as_alice, data, base_model, form_data, label):
    ids = {"M": base_model.pk, "D": data.pk}
    summary = as_alice.post(
        "/runs/new/summary", {name: ids.get(value, value) for name, value in form_data.items()}
    ).content.decode()
    assert label in summary


def test_a_warning_has_to_be_accepted(as_alice, data, base_model, no_queue):
    body = {"model": base_model.pk, "data": data.pk, "max_length": "64", "learning_rate": "0.1"}
    refused = as_alice.post("/runs/new", body)
    assert refused.status_code == 409
    (warning_id,) = re.findall(r'name="accepted_warnings" value="(\w+)"', refused.content.decode())
    accepted = as_alice.post("/runs/new", {**body, "accepted_warnings": warning_id})
    assert accepted.status_code == 302


def test_the_api_has_the_same_forecast_and_lengths(as_alice, data, base_model):
    body = json.dumps({"model": base_model.pk, "data": data.pk, "settings": {"rank": [4, 8]}})
    response = as_alice.post("/api/v1/runs/forecast", body, content_type="application/json").json()
    assert response["runs"] == 2
    length_stats = as_alice.get(f"/api/v1/runs/lengths?model={base_model.pk}&data={data.pk}").json()
    assert length_stats["rows"] == data.train_rows
    assert {s["name"] for s in as_alice.get("/api/v1/runs/settings").json()} >= {
        "rank",
        "packing",
        "early_stopping_patience",
    }


def test_forecast_tokens_agree_with_accumulation_and_max_steps(
    data, base_model, alice, engine_here
):
    from tests.launching import launch_run

    for more in (
        {"gradient_accumulation_steps": 4, "epochs": 2, "max_steps": 0},
        {"gradient_accumulation_steps": 2, "max_steps": 3},
    ):
        settings = {**tiny.SETTINGS, "max_tokens_per_batch": 80, **more}
        summary = forecast_run(
            RunConfig.from_dict(settings),
            base_model,
            data,
            get_lengths(data, base_model),
            get_target_device(),
        )
        run = launch_run(alice, base_model=base_model, data=data, settings=settings)
        engine_here([str(run.folder)])
        steps = [e for e in tiny.read_events(run.folder) if e["kind"] == "step"]
        assert (summary["steps"], summary["tokens"], summary["exact"]) == (
            len(steps),
            sum(e["tokens"] for e in steps),
            True,
        )


def test_target_modules_match_as_in_peft(data, base_model):
    dotted = forecast_run(
        RunConfig(target_modules="self_attn.q_proj", max_length=64),
        base_model,
        data,
        None,
        get_target_device(),
    )
    plain = forecast_run(
        RunConfig(target_modules="q_proj", max_length=64),
        base_model,
        data,
        None,
        get_target_device(),
    )
    assert dotted["trainable"] == plain["trainable"] > 0


def test_data_that_the_model_cannot_train_on_is_not_launched(
    tmp_path, as_alice, alice, data, base_model, no_queue
):
    folder = tiny.make_model(tmp_path / "strict", template="{{ raise_exception('never') }}")
    base_model.location = str(folder)
    base_model.save()
    get_lengths(data, base_model)
    chosen = {"model": base_model.pk, "data": data.pk, "max_length": "64"}
    summary = as_alice.post("/runs/new/summary", chosen).content.decode()
    assert "row 1" in summary
    assert "Choose another model or data" in summary
    assert as_alice.post("/runs/new", chosen).status_code == 400


def test_a_run_starts_each_time_that_its_data_cannot_be_measured(
    alice, data, base_model, no_queue, monkeypatch
):
    """A failed measurement is kept for some minutes. It is no reason to refuse the second run."""

    def run_out_of_memory(_request):
        raise UserError("out of memory", field="model", code="preview_failed")

    monkeypatch.setattr("training.runs.forecast.token_lengths.run_preview", run_out_of_memory)
    launched = [
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
        for _ in range(2)
    ]
    assert [run.state for run in launched] == ["queued", "queued"]


@pytest.mark.own_process
def test_a_model_whose_tokenizer_panics_is_refused_at_launch(
    alice, data, base_model, no_queue, tmp_path, tiny_model
):
    folder = tiny.copy_with_panicking_tokenizer(tiny_model, tmp_path / "model")
    base_model.location = str(folder)
    base_model.save()
    for _ in range(2):
        with raises_user_error(code="library_panic", field="model"):
            launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_a_viewer_is_refused_before_anything_is_measured(
    people, data, base_model, no_queue, monkeypatch
):
    requests = []
    monkeypatch.setattr("training.runs.forecast.token_lengths.run_preview", requests.append)
    with pytest.raises(NotAllowed):
        launch_run(people["vera"], base_model=base_model, data=data, settings=tiny.SETTINGS)
    assert not requests


def test_trained_tokens_end_at_max_length(data, base_model):
    lengths = get_lengths(data, base_model)
    assert get_truncation_stats(lengths, 128)["answer_tokens"] == int(lengths.trained.sum())
    assert get_truncation_stats(lengths, 20)["answer_tokens"] < int(lengths.trained.sum())


def test_batch_settings_has_every_setting_that_batching_reads():
    used_settings = set(re.findall(r"config\.(\w+)", inspect.getsource(batches)))
    assert {"max_length", "packing", "seed"} < used_settings <= set(BATCH_SETTINGS)
