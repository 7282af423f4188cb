"""Two trained versions are compared, voted on, deployed, queried with the `openai` client, switched
and rolled back in the browser.
"""

import re

import openai
import pytest
from playwright.sync_api import expect

from tests import tiny

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def versions(instance):
    """Two trained versions in the registry of this instance."""
    run_ids = []
    for seed in (1, 2):
        settings = {**tiny.SETTINGS, "max_steps": 30, "learning_rate": 0.02, "seed": seed}
        body = {
            "model": 1,
            "data": 1,
            "settings": settings,
            "name": f"Lamps {seed}",
            "accept_warnings": True,
        }
        run_ids.append(instance.call_api("POST", "/runs", body)["id"])
    instance.wait_for(
        lambda: all(
            instance.call_api("GET", f"/runs/{run}")["state"]["state"] == "finished"
            for run in run_ids
        ),
        240,
    )
    return {item["name"]: item["id"] for item in instance.call_api("GET", "/adapters")["items"]}


def test_compare_two_versions_and_vote_blind(page, instance, versions):
    page.goto(f"{instance.address}/adapters")
    for seed in (1, 2):
        page.get_by_label(f"Select Lamps {seed} v1").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="Compare 2 versions")).to_be_visible()
    expect(
        page.locator("table[data-settings] tr:not([hidden])").filter(has_text="seed")
    ).to_be_visible()
    page.get_by_role("button", name=re.compile("Answer up to")).click()
    # Base and two versions, one row held out
    expect(page.locator(".reply")).to_have_count(3, timeout=150_000)
    expect(page.locator("[data-maps] > div")).to_have_count(2, timeout=150_000)
    expect(page.get_by_text("subspace of their updates")).to_be_visible()

    page.get_by_text("Other prompts").click()
    page.get_by_label("Or paste prompts").fill(
        "turn on the hall lamp\nturn off the attic lamp\nis the porch dark"
    )
    page.get_by_role("button", name="Generate answers").click()
    expect(page.locator(".reply")).to_have_count(9, timeout=150_000)
    assert re.search(r"prompts=\d+", page.url)
    page.get_by_role("link", name="Vote blind").click()
    vote_count = 0
    end = page.get_by_text(re.compile("You have voted on all rows|Nothing to vote on"))
    tie = page.get_by_role("button", name="0: Neither is better")
    while expect(tie.or_(end)).to_be_visible() or not end.count():
        expect(page.locator("main")).not_to_contain_text("Lamps 1")
        page.wait_for_load_state("load")  # keys work only after the script has loaded
        page.keyboard.press("102"[vote_count % 3])
        vote_count += 1
        expect(
            page.get_by_text(f"You have voted on {vote_count} row").or_(
                page.get_by_text("win rate")
            )
        ).to_be_visible()
    if vote_count:
        page.get_by_role("link", name="Compare with names").click()
        expect(page.get_by_text("Blind votes")).to_be_visible()


def test_deploy_ask_switch_and_roll_back(page, instance, versions):
    page.goto(f"{instance.address}/adapters/{versions['Lamps 1']}")
    page.get_by_label("New name").fill("lamps")
    page.get_by_role("button", name="Merge and deploy").click()
    expect(page.get_by_role("heading", name="lamps", exact=True)).to_be_visible()
    client = openai.OpenAI(
        base_url=f"{instance.address}/v1", api_key=instance.token, max_retries=3, timeout=120
    )

    def ask_deployment():
        messages = [{"role": "user", "content": "turn on the hall lamp"}]
        return (
            client.chat.completions.create(
                model="lamps", messages=messages, temperature=0, max_tokens=12
            )
            .choices[0]
            .message.content
        )

    attached = ask_deployment()
    expect(page.get_by_text("Merged into its base")).to_be_visible(timeout=150_000)
    expect(page.get_by_text("identical answers")).to_be_visible()
    assert ask_deployment() == attached
    expect(page.locator("#live tr").filter(has_text="Lamps 1 v1").locator("td").last).to_have_text(
        "2"
    )

    page.get_by_label("Version", exact=True).select_option(label="Lamps 2 v1 · tiny-llama")
    page.get_by_label("Weights").select_option("no")
    page.get_by_role("button", name="Switch", exact=True).click()
    expect(page.get_by_text("lamps now serves Lamps 2 v1.")).to_be_visible()
    other = ask_deployment()
    page.get_by_role("button", name="Roll back to Lamps 1 v1").click()
    expect(page.get_by_text("lamps was rolled back to Lamps 1 v1.")).to_be_visible()
    assert ask_deployment() == attached
    assert other
    page.goto(f"{instance.address}/adapters/{versions['Lamps 1']}")
    page.get_by_text("Delete this version").click()
    page.get_by_label("Type Lamps 1 v1").fill("Lamps 1 v1")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(
        page.get_by_text("Lamps 1 v1 is deployed as lamps. Switch or delete the deployment first.")
    ).to_be_visible()
    page.console_errors.clear()  # the browser notes the 409
    page.goto(f"{instance.address}/deployments/lamps")
    page.get_by_label("Type lamps").fill("lamps")
    page.get_by_role("button", name="Delete deployment").click()
    expect(page.get_by_text("Deployment lamps was deleted")).to_be_visible()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="lamps", messages=[{"role": "user", "content": "x"}])
