"""A user sees why a run is queued; an admin lowers a limit, previews the change, holds, drains, and
lifts the hold.
"""

import json
import re

import pytest
from playwright.sync_api import expect

from tests import tiny
from tests.browser.instances import sign_in

pytestmark = pytest.mark.browser
SETTINGS = {**tiny.SETTINGS, "max_steps": 100_000, "save_steps": 50, "eval_steps": 100_000}
BOB = """
import json, sys, django
django.setup()
from tests import tiny
from training.catalog.models import BaseModel
from training.datasets.upload_job import create_dataset
from training.people.models import Team, User
from training.people.teams import add_member
from tests.launching import launch_run
bob = User.objects.create_user("bob", password="tulip-river-42")
add_member(bob, Team.objects.create(name="voice"))
bob.refresh_from_db()
data = create_dataset(bob, "Bob's lights", tiny.encode_jsonl(tiny.ROWS), source="test")
model, settings = BaseModel.objects.get(name="tiny-llama"), json.loads(sys.argv[1])
made = [
    launch_run(bob, base_model=model, data=data, settings=settings, name=name)
    for name in ("First", "Second")
]
print(json.dumps([run.pk for run in made]))
"""


@pytest.fixture(scope="module")
def two_runs(instance):
    """The ids of bob's runs: the first trains, the second is queued."""
    first, second = json.loads(instance.run_python(BOB, json.dumps(SETTINGS)))
    instance.wait_for(lambda: instance.call_api("GET", f"/runs/{first}")["state"]["step"] > 0)
    return first, second


def test_a_queued_run_shows_its_position_and_the_reason(two_runs, chromium, instance):
    page = chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()
    sign_in(page, instance, "bob")
    page.get_by_role("link", name="Second").click()
    phase = page.locator("[data-live=phase]")
    expect(phase).to_contain_text("position 1 of 1", timeout=20_000)
    expect(phase).to_contain_text(re.compile("the only device of CPU.* is in use"))
    page.get_by_role("link", name="GPUs").click()
    row = page.get_by_role("row", name=re.compile("Second"))
    expect(row).to_contain_text(re.compile("the only device of CPU.* is in use"))
    expect(page.get_by_role("row", name=re.compile("In use"))).to_contain_text("First")
    row.get_by_text("Actions").click()
    row.get_by_role("button", name="Set priority to background").click()
    expect(page.get_by_role("row", name=re.compile("Second"))).to_contain_text("Background")
    expect(page.get_by_role("link", name="Quotas")).to_have_count(0)
    page.context.close()


def test_an_admin_previews_a_limit_then_holds_drains_and_lifts_the_hold(two_runs, page, instance):
    first, _ = two_runs
    page.goto(instance.address)
    page.get_by_role("link", name="Quotas").click()
    page.get_by_role("row", name=re.compile("voice")).get_by_role("link", name="Edit").click()
    page.get_by_label("Limit").fill("0")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_role("status")).to_contain_text("Nothing is saved yet")
    expect(page.get_by_role("status")).to_contain_text("Second")
    expect(page.get_by_role("status")).to_contain_text("would not start")
    expect(page.get_by_label("Limit")).to_have_value("0")
    assert instance.call_api("GET", "/gpus/pools/1/quotas")["items"][0]["limit"] is None

    page.get_by_role("button", name="Hold and drain…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="Hold and drain…").click()
    page.get_by_role("dialog").get_by_role("button", name="Hold and drain").click()
    expect(page.get_by_text("On hold")).to_be_visible()
    instance.wait_for(
        lambda: instance.call_api("GET", f"/runs/{first}")["state"]["state"] == "queued"
    )
    state = instance.call_api("GET", f"/runs/{first}")["state"]
    assert (
        "by an admin who is draining its devices" in state["message"]
        and "no steps are lost" in state["message"]
    )

    page.goto(f"{instance.address}/runs/{first}")
    expect(page.locator("[data-live=phase]")).to_contain_text(
        "team voice is on hold", timeout=20_000
    )
    page.goto(instance.address + "/audit")
    expect(page.get_by_role("cell", name="hold and drain", exact=True)).to_be_visible()
    page.goto(instance.address + "/quotas")
    page.get_by_role("row", name=re.compile("voice")).get_by_role("link", name="Edit").click()
    page.get_by_role("button", name="Lift hold").click()
    instance.wait_for(
        lambda: instance.call_api("GET", f"/runs/{first}")["state"]["state"] == "running"
    )
