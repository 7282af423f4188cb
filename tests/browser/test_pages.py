"""Every page fits both widths, has no serious axe violation in light and dark mode, and logs no
error to the console.
"""

from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.browser import fill_pages
from tests.browser.instances import start_instance

pytestmark = pytest.mark.browser
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"


@pytest.fixture(scope="module")
def instance(tmp_path_factory, tiny_model):
    """A separate instance, because hundreds of rows would affect other modules."""
    with start_instance(tmp_path_factory, tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def filled(instance):
    return instance.run_python(Path(fill_pages.__file__).read_text()).strip()


PAGES = [
    "/",
    "/runs/new",
    "/runs/{run}",
    "/data",
    "/data/new",
    "/data/1",
    "/data/uploads/1",
    "/models",
    "/models/1",
    "/adapters",
    "/adapters/1",
    "/adapters/import",
    "/disk",
    "/adapters/compare?v=1&v=2",
    "/adapters/compare?v=1&v=2&prompts=1",
    "/adapters/vote?prompts=1&first=1&second=2",
    "/deployments",
    "/deployments/lamps",
    "/benchmarks/new",
    "/benchmarks/2",
    "/account",
    "/gpus",
    "/quotas",
    "/quotas/1/0",
    "/quotas/pools/1",
    "/quotas/people/alice",
    "/audit",
    "/sweeps/1",
    "/runs/compare?run={run}&run=1",
]


@pytest.mark.parametrize("path", PAGES)
def test_every_page_fits_both_widths_and_is_accessible_in_both_themes(page, instance, filled, path):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.goto(instance.address + path.format(run=filled))
    page.wait_for_load_state("networkidle", timeout=120_000)
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    page.evaluate(AXE.read_text())
    assert find_serious_violations(page) == []
    page.emulate_media(color_scheme="dark")
    # Contrast is all that another color scheme changes
    assert find_serious_violations(page, only=["color-contrast"]) == []
    page.set_viewport_size({"width": 390, "height": 900})
    page.reload()
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def find_serious_violations(page, only=None) -> list[tuple[str, str, int]]:
    options = {"resultTypes": ["violations"]} | ({"runOnly": only} if only else {})
    violations = page.evaluate("options => axe.run(document, options)", options)["violations"]
    return [
        (v["id"], v["nodes"][0]["html"][:200], len(v["nodes"]))
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]


def test_the_theme_switch_stays_after_a_reload(page, instance):
    page.goto(instance.address)
    page.get_by_label("Account menu").click()
    page.get_by_role("button", name="Light / dark").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_keyboard_shortcuts_navigate_and_are_listed(page, instance):
    page.goto(instance.address)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.wait_for_url(instance.address + "/data")
    page.keyboard.press("n")
    page.wait_for_url(instance.address + "/runs/new")


def test_typing_filters_the_list_and_updates_the_url(page, instance, filled):
    page.goto(instance.address + "/")
    page.get_by_label("Search names, tags and notes").press_sequentially("number 17")
    expect(page.locator("td.name")).to_have_count(11)
    page.wait_for_url("**/?q=number*17*")
    page.reload()
    expect(page.locator("td.name")).to_have_count(11)


def test_the_chart_options_are_in_the_url(page, instance, filled):
    page.goto(f"{instance.address}/runs/{filled}?axis=total_tokens&smoothing=0.9")
    assert page.locator("[data-axis]").input_value() == "total_tokens"
    page.locator("[data-axis]").select_option("time")
    assert "axis=time" in page.url
    assert "smoothing=0.9" in page.url


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=document.title='owned'>",
        "{{7*7}}<script>document.title='owned'</script>",
    ],
)
def test_markup_in_a_name_is_escaped(page, instance, name):
    models, data = instance.call_api("GET", "/models"), instance.call_api("GET", "/datasets")
    settings = {"max_steps": 1, "max_tokens_per_batch": 80, "max_length": 80}
    body = {
        "model": models["items"][0]["id"],
        "data": data["items"][0]["versions"][0]["id"],
        "settings": settings,
        "name": name,
        "accept_warnings": True,
    }
    run = instance.call_api("POST", "/runs", body)["id"]
    for path in ("/", f"/runs/{run}"):
        page.goto(instance.address + path)
        expect(page.get_by_text(name).first).to_be_visible()
        page.wait_for_timeout(300)
        assert page.title() != "owned"
