"""What will be trained, told before it is: tokens with their fate, lengths, and a forecast that
training then keeps.
"""

import inspect
import json
import re
import shutil

import pytest

from tests import tiny
from training.datasets.work import create_dataset
from training.engine import batches
from training.engine.config import RunConfig
from training.runs.forecast.batch_shapes import BATCHING
from training.runs.forecast.summary import forecast
from training.runs.forecast.target_device import target_of
from training.runs.forecast.token_lengths import cut_at, histogram, lengths, padding, tokens_of
from training.runs.launch.sweep import warning_id

pytestmark = [pytest.mark.django_db, pytest.mark.once]


@pytest.fixture(autouse=True)
def preview_here_unless_marked(request):
    if not request.node.get_closest_marker("own_process"):
        request.getfixturevalue("preview_here")


@pytest.fixture(autouse=True)
def nothing_measured_yet(data):
    """Equal content lies in one folder, so what another test measured of it would be found."""
    shutil.rmtree(data.file("train").parent / "lengths", ignore_errors=True)


def text_of(row, kind):
    return "".join("".join(piece["tokens"]) for piece in row["spans"] if piece["kind"] == kind)


@pytest.mark.own_process
def test_tokens_are_shown_with_their_fate(base_model):
    told = tokens_of(base_model, tiny.ROWS[:1], max_length=20, train_on_prompt=False)
    row = told["rows"][0]
    assert told["template"] == "model"
    assert (
        text_of(row, "m")
        == "<|im_start|>user\nturn on the kitchen lamp<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(row, "t").startswith('{"intent"')
    assert text_of(row, "c").endswith("<|im_end|>\n")
    assert sum(len(piece["tokens"]) for piece in row["spans"]) == row["tokens"]


def test_characters_of_several_tokens_and_plain_text_are_whole(base_model):
    row = tokens_of(base_model, [{"text": "hé 😀 ok"}], max_length=99, train_on_prompt=False)[
        "rows"
    ][0]
    assert text_of(row, "m") + text_of(row, "t") == "hé 😀 ok<|im_end|>"


def test_a_row_that_the_template_cannot_hold_says_why(base_model):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "lamp", "arguments": {}}}],
    }
    row = tokens_of(
        base_model,
        [{"messages": [{"role": "user", "content": "a"}, call]}],
        max_length=99,
        train_on_prompt=False,
    )["rows"][0]
    assert "leaves out the tool call `lamp`" in row["problem"]


@pytest.mark.own_process
def test_an_endless_template_ends_in_a_sentence(base_model, tmp_path, monkeypatch, settings):
    from training.errors import UserError

    folder = tiny.make_model(
        tmp_path / "endless", template="{% for i in range(999999999) %}x{% endfor %}"
    )
    base_model.location = str(folder)
    monkeypatch.setattr("training.runs.forecast.token_lengths.PATIENCE_SECONDS", 8)
    with pytest.raises(UserError, match=r"took too long|broke off|cannot read"):
        tokens_of(base_model, tiny.ROWS[:1], max_length=99, train_on_prompt=False)


@pytest.mark.own_process
def test_the_forecast_is_what_training_then_does(data, base_model, alice, engine_here):
    """Steps, rows, tokens and trainable parameters of the card against the engine's own start
    event.
    """
    from tests.launching import launch_run

    settings = {
        **tiny.SETTINGS,
        "max_steps": 0,
        "epochs": 2,
        "max_length": 30,
        "max_tokens_per_batch": 100,
    }
    found = lengths(data, base_model)
    said = forecast(RunConfig.from_dict(settings), base_model, data, found, target_of())
    run = launch_run(alice, base_model=base_model, data=data, settings=settings)
    engine_here([str(run.folder)])
    events = tiny.read_events(run.folder)
    start = next(e for e in events if e["kind"] == "start")
    assert said["steps"] == start["total_steps"]
    assert said["trainable"] == start["trainable_parameters"]
    assert said["lengths"]["cut"] == start["truncated_rows"]
    assert said["lengths"]["empty"] == start["empty_rows"]
    assert said["tokens"] == sum(e["tokens"] for e in events if e["kind"] == "step")
    assert said["evals"] == sum(e["kind"] == "eval" for e in events)


def test_lengths_are_measured_once(data, base_model, monkeypatch):
    first = lengths(data, base_model)
    monkeypatch.setattr("training.runs.forecast.token_lengths.ask", None)
    again = lengths(data, base_model)
    assert (again.total == first.total).all()


def test_of_a_large_set_a_part_is_measured_and_the_page_says_so(
    data, base_model, monkeypatch, as_alice
):
    monkeypatch.setattr("training.runs.forecast.token_lengths.MOST_ROWS", 10)
    found = lengths(data, base_model)
    assert found.measured < found.rows == data.train_rows
    assert not forecast(RunConfig(max_length=64), base_model, data, found, target_of())["exact"]
    page = as_alice.get(f"/data/versions/{data.pk}/trained").content.decode()
    assert f"Counted on {found.measured} of {data.train_rows} rows" in page


def test_shares_padding_and_histogram(data, base_model):
    found = lengths(data, base_model)
    facts = cut_at(found, 25)
    assert 0 < facts["cut"] <= found.rows
    assert facts["longest"] == found.total.max()
    told = padding(found, RunConfig(max_length=64, max_tokens_per_batch=128))
    assert told["ours"] < told["random"]
    bars = histogram(found)
    assert sum(bars["total"]) == sum(bars["prompt"]) == sum(bars["answer"]) == found.measured


def test_the_page_shows_colours_shares_and_the_template(as_alice, data, base_model):
    page = as_alice.get(f"/data/versions/{data.pk}/trained?length=128").content.decode()
    assert '<span class="t">' in page
    assert '<span class="m">' in page
    assert "The model's own chat template is used" in page
    assert "padding" in page


def test_a_model_without_a_template_uses_the_plain_one_and_says_so(
    tmp_path, as_alice, data, base_model
):
    folder = tiny.make_model(tmp_path / "bare", template=None)
    base_model.location = str(folder)
    base_model.save()
    assert (
        "has no chat template; SnapML"
        in as_alice.get(f"/data/versions/{data.pk}/trained").content.decode()
    )


def test_rows_with_markup_are_shown_as_text(as_alice, alice, base_model):
    rows = [tiny.make_row(f"<script>alert({i})</script>", "<b>x</b>") for i in range(3)]
    version = create_dataset(alice, "Sly", tiny.encode_jsonl(rows), source="x")
    page = as_alice.get(f"/data/versions/{version.pk}/trained").content.decode()
    assert "<script>alert" not in page
    assert "<b>x" not in page


def test_the_card_counts_once_it_is_asked_to(as_alice, data, base_model):
    chosen = {
        "model": base_model.pk,
        "data": data.pk,
        "max_length": "64",
        "max_tokens_per_batch": "128",
    }
    assert "counting tokens" in as_alice.post("/runs/new/card", chosen).content.decode()
    answer = as_alice.get(f"/runs/new/measured?model={base_model.pk}&data={data.pk}")
    assert (answer.status_code, answer["HX-Trigger"]) == (204, "measured")
    card = as_alice.post("/runs/new/card", chosen).content.decode()
    assert "counting tokens" not in card
    assert "128 tokens a step" in card


@pytest.mark.parametrize(
    ("posted", "label"),
    [
        ({}, "Choose model and data"),
        ({"model": "M"}, "Choose data"),
        ({"model": "M", "data": "D", "rank": "0"}, "Correct Rank"),
        ({"model": "M", "data": "D", "max_length": "64"}, "Start run"),
        ({"model": "M", "data": "D", "max_length": "64", "learning_rate": "0.1"}, "Start anyway"),
    ],
)
def test_the_button_names_the_next_thing_that_is_missing(as_alice, data, base_model, posted, label):
    places = {"M": base_model.pk, "D": data.pk}
    card = as_alice.post(
        "/runs/new/card", {name: places.get(value, value) for name, value in posted.items()}
    ).content.decode()
    assert label in card


def test_a_warning_is_passed_only_by_who_has_seen_it(as_alice, data, base_model, no_bell):
    asked = {"model": base_model.pk, "data": data.pk, "max_length": "64", "learning_rate": "0.1"}
    refused = as_alice.post("/runs/new", asked)
    assert refused.status_code == 409
    warning = (
        "learning_rate is 0.1; above 0.005 the loss of LoRA usually jumps. 0.001 is a safe start."
    )
    assert warning in refused.content.decode()
    assert as_alice.post("/runs/new", {**asked, "seen": warning_id(warning)}).status_code == 302


def test_the_api_tells_the_same(as_alice, data, base_model):
    body = json.dumps({"model": base_model.pk, "data": data.pk, "settings": {"rank": [4, 8]}})
    told = as_alice.post("/api/v1/runs/forecast", body, content_type="application/json").json()
    assert told["runs"] == 2
    found = as_alice.get(f"/api/v1/runs/lengths?model={base_model.pk}&data={data.pk}").json()
    assert found["rows"] == data.train_rows
    assert {s["name"] for s in as_alice.get("/api/v1/runs/settings").json()} >= {
        "rank",
        "packing",
        "early_stopping_patience",
    }


def test_tokens_are_right_with_accumulation_and_with_most_steps(
    data, base_model, alice, engine_here
):
    from tests.launching import launch_run

    for more in (
        {"gradient_accumulation_steps": 4, "epochs": 2, "max_steps": 0},
        {"gradient_accumulation_steps": 2, "max_steps": 3},
    ):
        settings = {**tiny.SETTINGS, "max_tokens_per_batch": 80, **more}
        said = forecast(
            RunConfig.from_dict(settings), base_model, data, lengths(data, base_model), target_of()
        )
        run = launch_run(alice, base_model=base_model, data=data, settings=settings)
        engine_here([str(run.folder)])
        steps = [e for e in tiny.read_events(run.folder) if e["kind"] == "step"]
        assert (said["steps"], said["tokens"], said["exact"]) == (
            len(steps),
            sum(e["tokens"] for e in steps),
            True,
        )


def test_target_modules_count_as_peft_matches_them(data, base_model):
    dotted = forecast(
        RunConfig(target_modules="self_attn.q_proj", max_length=64),
        base_model,
        data,
        None,
        target_of(),
    )
    plain = forecast(
        RunConfig(target_modules="q_proj", max_length=64), base_model, data, None, target_of()
    )
    assert dotted["trainable"] == plain["trainable"] > 0


def test_data_that_the_model_cannot_hold_is_not_launched(
    tmp_path, as_alice, alice, data, base_model, no_bell
):
    folder = tiny.make_model(tmp_path / "strict", template="{{ raise_exception('never') }}")
    base_model.location = str(folder)
    base_model.save()
    lengths(data, base_model)
    chosen = {"model": base_model.pk, "data": data.pk, "max_length": "64"}
    card = as_alice.post("/runs/new/card", chosen).content.decode()
    assert "This model cannot be trained on this data; the first such row is row 1" in card
    assert "Choose another model or data" in card
    assert as_alice.post("/runs/new", chosen).status_code == 400


def test_trained_tokens_stop_at_the_length(data, base_model):
    found = lengths(data, base_model)
    assert cut_at(found, 128)["answer_tokens"] == int(found.trained.sum())
    assert cut_at(found, 20)["answer_tokens"] < int(found.trained.sum())


def test_every_setting_that_the_batches_ask_for_is_among_those_that_are_remembered():
    asked = set(re.findall(r"config\.(\w+)", inspect.getsource(batches)))
    assert {"max_length", "packing", "seed"} < asked <= set(BATCHING)
