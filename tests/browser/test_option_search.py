"""A select with many options shows the first ones, and a search field replaces them."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
ADD_MODELS = """
import django
django.setup()
from training.catalog.models import BaseModel
tiny = BaseModel.objects.get(name="tiny-llama")
BaseModel.objects.bulk_create(
    BaseModel(name=f"z-{n:03}", state="ready", source="folder", location=tiny.location,
              metadata=tiny.metadata)
    for n in range(150)
)
"""
DELETE_MODELS = """
import django
django.setup()
from training.catalog.models import BaseModel
BaseModel.objects.filter(name__startswith="z-").delete()
"""


@pytest.fixture
def many_models(instance):
    instance.run_python(ADD_MODELS)
    yield
    instance.run_python(DELETE_MODELS)


@pytest.mark.parametrize("width", [1440, 375])
def test_a_search_finds_the_models_that_the_select_does_not_show(
    page, instance, many_models, width
):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(instance.address + "/runs/new")
    model = page.get_by_label("Base model")
    search = page.get_by_label("Search models")
    expect(model.locator("option")).to_have_count(101)
    expect(page.get_by_label("Search data")).to_have_count(0)
    search.fill("z-14")
    expect(model.locator("option")).to_have_count(11)
    search.press("Enter")  # starts no run
    model.select_option(label="z-149")
    expect(page.locator("#summary")).to_contain_text("z-149")
    search.fill("z-000")
    expect(model.locator("option")).to_have_count(3)
    expect(model.locator("option:checked")).to_have_text(re.compile("z-149"))
    expect(page).to_have_url(instance.address + "/runs/new")
    box = search.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_a_search_leaves_no_trace_in_the_address(page, instance, many_models):
    page.goto(instance.address + "/adapters/import")
    page.get_by_label("Search models").fill("z-14")
    expect(page.get_by_label("Base model").locator("option")).to_have_count(11)
    expect(page).to_have_url(instance.address + "/adapters/import")
