"""The layout of rendered pages: sizes, positions and texts that only a browser can check."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests import tiny
from tests.browser.instances import start_instance

pytestmark = pytest.mark.browser

FILL = """
import django
django.setup()
from training.catalog.models import BaseModel
from training.datasets.models import Dataset, DatasetVersion
from training.people.models import User
from tests.launching import launch_run
from training.runs.models import Run
from training.runs.worker import tasks
from tests.registry import register_version
tasks.supervise_task = lambda _id: None
alice, data = User.objects.get(), DatasetVersion.objects.get()
model = BaseModel.objects.order_by("pk").first()
for name in ("Intents, rank 16", "Support answers with a long name"):
    run = launch_run(alice, base_model=model, data=data, settings={}, name=name)
    figures = {"loss": 1.2345, "best_eval_loss": 1.3456, "peak_memory_bytes": 14_900_000_000}
    figures |= {"step": 12_000, "total_steps": 120_000, "sparkline": [3, 2, 1]}
    Run.objects.filter(pk=run.pk).update(state="finished", **figures)
    register_version(run, name=name)
"""
LONG_NAMES = """
import django
django.setup()
from training.catalog.models import BaseModel
from training.datasets.models import Dataset
model = BaseModel.objects.order_by("pk").first()
BaseModel.objects.filter(pk=model.pk).update(name="SmolLM2-135M-Instruct-and-more")
Dataset.objects.update(name="customer_support_conversations")
"""
SHORT_NAMES = """
import django
django.setup()
from training.catalog.models import BaseModel
from training.datasets.models import Dataset
model = BaseModel.objects.order_by("pk").first()
BaseModel.objects.filter(pk=model.pk).update(name="tiny-llama")
Dataset.objects.update(name="Lights")
"""
IMPORTING = """
import django
django.setup()
from training.catalog.models import BaseModel
ready = BaseModel.objects.order_by("pk").first()
ready.pk, ready.name, ready.state = None, "slow-llama", "importing"
ready.save()
"""
IMPORTED = """
import django
django.setup()
from training.catalog.models import BaseModel
BaseModel.objects.filter(name="slow-llama").update(state="ready")
"""


@pytest.fixture(scope="module")
def instance(tmp_path_factory, tiny_model):
    """A separate instance, because its model and data are renamed."""
    with start_instance(tmp_path_factory, tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def filled(instance):
    """Two finished runs and a version of each."""
    instance.run_python(FILL)


@pytest.fixture
def long_names(instance, filled):
    instance.run_python(LONG_NAMES)
    yield
    instance.run_python(SHORT_NAMES)


def test_the_runs_table_has_equal_margins_in_its_card(page, instance, long_names):
    page.goto(instance.address + "/")
    card, table = (
        page.locator(selector).bounding_box() for selector in ("#table .card", "#table table")
    )
    left = table["x"] - card["x"]
    right = card["x"] + card["width"] - table["x"] - table["width"]
    assert right == pytest.approx(left, abs=1)


def test_heatmaps_of_two_versions_are_side_by_side(page, instance, filled):
    layers = {f"layers.{layer}.{name}": [layer, name] for layer in range(4) for name in "qv"}
    relative_change = {pk: dict.fromkeys(layers, 0.01 * pk) for pk in (1, 2)}
    result = {
        "relative_change": relative_change,
        "layers": layers,
        "similarities": {},
        "outputs": {},
        "overlaps": [],
    }
    versions = [{"id": pk, "name": f"Version {pk}"} for pk in (1, 2)]
    answer = json.dumps({"state": "done", "result": result, "versions": versions})
    page.route("**/adapters/compare/weights", lambda route: route.fulfill(body=answer))
    page.goto(f"{instance.address}/adapters/compare?v=1&v=2")
    expect(page.locator("[data-maps] svg.main-svg .heatmaplayer image")).to_have_count(2)
    drawn = page.locator("[data-maps] .svg-container > svg:first-child")
    first, second = (drawn.nth(index).bounding_box() for index in (0, 1))
    assert first["x"] + first["width"] <= second["x"]
    assert first["width"] == pytest.approx(second["width"], abs=1)


def test_the_phase_is_training_after_the_first_step(page, instance):
    settings = {**tiny.SETTINGS, "max_steps": 100_000, "eval_steps": 100_000}
    body = {"model": 1, "data": 1, "settings": settings, "name": "Far", "accept_warnings": True}
    run = instance.call_api("POST", "/runs", body)["id"]
    page.goto(f"{instance.address}/runs/{run}")
    expect(page.locator("[data-live=step]")).to_have_text(re.compile("^[1-9]"), timeout=150_000)
    expect(page.locator("[data-live=phase]")).to_have_text("training")
    instance.call_api("POST", f"/runs/{run}/stop", {})


def test_a_model_can_be_selected_as_soon_as_its_import_ends(page, instance):
    instance.run_python(IMPORTING)
    page.goto(instance.address + "/runs/new")
    model, model_requests = page.locator("#model"), []
    page.on(
        "request",
        lambda request: "/runs/new/models" in request.url and model_requests.append(request),
    )
    expect(model.get_by_text("slow-llama (importing)")).to_be_disabled()
    page.get_by_label("Name", exact=True).fill("Unchanged")
    page.locator("#data").select_option(index=1)
    model.select_option(label="tiny-llama")
    page.wait_for_timeout(2500)
    assert len(model_requests) == 1
    instance.run_python(IMPORTED)
    expect(model.locator("option", has_text="slow-llama")).to_be_enabled()
    expect(model.locator("option:checked")).to_have_text("tiny-llama")
    assert page.get_by_label("Name", exact=True).input_value() == "Unchanged"
    assert page.locator("#data").input_value() == "1"
    model.select_option(label="slow-llama")
    request_count = len(model_requests)
    page.wait_for_timeout(2500)
    assert len(model_requests) == request_count


def test_the_launch_page_loads_settings_from_a_file(page, instance, filled, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny-llama\ndata: Lights\nname: From a file\nsettings: {rank: 4}\n")
    page.goto(instance.address + "/runs/new")
    page.get_by_text("Load from file", exact=True).click()
    page.locator("#yaml").set_input_files(file)
    page.get_by_role("button", name="Load settings from file").click()
    expect(page.locator("[name=name]")).to_have_value("From a file")
