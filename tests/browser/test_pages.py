"""Every page: nothing runs out of the window at both widths, axe finds no serious fault, light or
dark, the console is empty.
"""

from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
FILL = """
import django
django.setup()
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.people.models import User
from training.runs.worker import tasks
from tests.launching import launch_run
from training.runs.models import Run
tasks.supervise = lambda _id: None
alice = User.objects.get()
for number in range(200):
    name = "A run with quite a long name that says everything about its settings and more, number %d" % number
    run = launch_run(alice, base_model=BaseModel.objects.get(), data=DatasetVersion.objects.get(), settings={}, name=name)
    Run.objects.filter(pk=run.pk).update(state="failed", message="It was too much. " * 20, sparkline=[3, 2, 1.5], step=7, total_steps=9)
from training.datasets.intake import receive
from training.runs.models import Sweep
from pathlib import Path
from django.conf import settings
sweep = Sweep.objects.create(owner=alice, team=None, name="A sweep with a long name " * 4, grid={"rank": [1, 2], "learning_rate": [0.1, 0.2]})
Run.objects.filter(pk__lte=12).update(sweep=sweep, tags=",one,two,", best_heldout_loss=1.5)
path = Path(settings.HOME) / "fragen.csv"
path.write_text("id,Frage,Antwort\\n" + "".join("%d,%s,yes\\n" % (i, "Long words " * 30) for i in range(30)))
receive(alice, [(path, "fragen.csv", "")], name="A name of an upload that is quite long, too " * 2, source="upload: fragen.csv")
from adapters.serving import services as deploy
from adapters.evaluation.benchmark import METHODS
from adapters.models import PromptSet, Reply
from tests.shelf import put_on_shelf
long = "An adapter with quite a long name that says what it is for"
made = [put_on_shelf(Run.objects.get(pk=1), name=long, number=n, heldout_loss=1.5, tags=",candidate,") for n in range(1, 111)]
deploy.deploy(alice, "lamps", deploy.Answering(made[0], made[1], 20, merge=False))
rows = [{"messages": [{"role": "user", "content": "Long words " * 30}], "expected": "yes, it is"} for _ in range(60)]
prompts = PromptSet.objects.create(owner=alice, name="Sixty prompts with a long name " * 3, rows=rows)
scores = {"exact": 0.0, "normalised": 0.0, "rouge_l": 0.5, "chrf": 0.5, "perplexity": 2.0}
for row in range(60):
    for version in (made[0], made[1], None):
        text = f"{version} says a long thing " * 20
        Reply.objects.create(prompts=prompts, row=row, version=version, base_model=made[0].base_model, text=text, scores=scores)
bakeoff = Sweep.objects.create(owner=alice, team=None, name="All methods on a long name " * 3, grid={"method": list(METHODS)})
Run.objects.filter(pk__in=range(20, 26)).update(sweep=bakeoff)
for number, method in enumerate(METHODS):
    Run.objects.filter(pk=20 + number).update(method=method)
print(Run.objects.order_by("pk").last().pk)
"""


@pytest.fixture(scope="module")
def filled(stage):
    return stage.python(FILL).strip()


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
    "/adapters/disk",
    "/adapters/compare?v=1&v=2",
    "/adapters/compare?v=1&v=2&prompts=1",
    "/adapters/vote?prompts=1&first=1&second=2",
    "/deployments",
    "/deployments/lamps",
    "/bakeoffs/new",
    "/bakeoffs/2",
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
def test_it_fits_both_widths_and_axe_finds_no_serious_fault_light_or_dark(
    page, stage, filled, path
):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.goto(stage.address + path.format(run=filled))
    page.wait_for_load_state("networkidle", timeout=120_000)
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    page.evaluate(AXE.read_text())
    assert serious_faults(page) == []
    page.emulate_media(color_scheme="dark")
    assert serious_faults(page, only=["color-contrast"]) == []  # all that another scheme changes
    page.set_viewport_size({"width": 390, "height": 900})
    page.reload()
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def serious_faults(page, only=None) -> list[tuple[str, str, int]]:
    options = {"resultTypes": ["violations"]} | ({"runOnly": only} if only else {})
    found = page.evaluate("options => axe.run(document, options)", options)["violations"]
    return [
        (v["id"], v["nodes"][0]["html"][:200], len(v["nodes"]))
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


def test_the_theme_switch_stays_after_a_reload(page, stage):
    page.get_by_label("Account menu").click()
    page.get_by_role("button", name="Light / dark").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_keys_lead_about_and_say_which_they_are(page, stage):
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.wait_for_url(stage.address + "/data")
    page.keyboard.press("n")
    page.wait_for_url(stage.address + "/runs/new")


def test_the_list_is_searched_while_one_types_and_the_address_keeps_it(page, stage, filled):
    page.goto(stage.address + "/")
    page.get_by_label("Search names, tags and notes").press_sequentially("number 17")
    expect(page.locator("td.name")).to_have_count(11)
    page.wait_for_url("**/?q=number*17*")
    page.reload()
    expect(page.locator("td.name")).to_have_count(11)


def test_what_the_chart_shows_is_in_the_address(page, stage, filled):
    page.goto(f"{stage.address}/runs/{filled}?axis=total_tokens&smoothing=0.9")
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
def test_a_name_that_is_markup_is_shown_and_not_run(page, stage, name):
    models, data = stage.api("GET", "/models"), stage.api("GET", "/datasets")
    settings = {"max_steps": 1, "tokens_per_batch": 80, "max_length": 80}
    body = {
        "model": models["items"][0]["id"],
        "data": data["items"][0]["versions"][0]["id"],
        "settings": settings,
        "name": name,
        "accept_warnings": True,
    }
    run = stage.api("POST", "/runs", body)["id"]
    for path in ("/", f"/runs/{run}"):
        page.goto(stage.address + path)
        expect(page.get_by_text(name).first).to_be_visible()
        page.wait_for_timeout(300)
        assert page.title() != "owned"
