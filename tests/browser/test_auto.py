"""Auto in the browser: plan, lock, launch, forecast and measured memory, adapter; and a launch with
every method.
"""

import re

import pytest
from playwright.sync_api import expect

from tests.browser.launch_page import choose_model_and_data, open_manual_form, wait_for_summary
from training.engine.methods import METHODS

pytestmark = pytest.mark.browser


def start_and_finish(page):
    wait_for_summary(page)
    page.get_by_role("button", name=re.compile("Start run|Start anyway")).click(timeout=150_000)
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    expect(page.locator("[data-live=label]")).to_have_text("Finished", timeout=180_000)
    expect(page.get_by_text("was saved")).to_be_visible()


def test_auto_plans_with_locked_settings_and_trains_an_adapter(page, instance):
    page.goto(instance.address + "/runs/new")
    expect(page.get_by_role("radio", name="Auto")).to_be_checked()
    choose_model_and_data(page)
    plan = page.locator("ol.plan")
    expect(plan).to_contain_text("LoRA fits", timeout=120_000)
    page.get_by_label("Rank").fill("4")
    expect(page.get_by_label("Alpha")).to_have_value("8")
    expect(plan.locator("li.locked")).to_have_count(1)
    page.get_by_label("Max steps").fill("12")
    expect(page.locator("#summary")).to_contain_text(
        re.compile(r"\b12,\s+\d+ evaluations"), timeout=90_000
    )
    start_and_finish(page)
    expect(
        page.get_by_text(re.compile(r"forecast [\d.]+ [kMG]B,\s+measured [\d.]+ [kMG]B"))
    ).to_be_visible()
    page.get_by_role("tab", name="Plan").click()
    expect(page.locator("#tab-plan")).to_contain_text("The plan would use")
    expect(page.locator("#tab-config")).to_be_hidden()


def test_typing_replaces_a_selected_value_after_the_plan_was_updated(page, instance):
    page.goto(instance.address + "/runs/new")
    choose_model_and_data(page)
    expect(page.locator("ol.plan")).to_contain_text("LoRA fits", timeout=120_000)
    page.get_by_label("Rank").fill("4")
    max_steps = page.get_by_label("Max steps")
    old_field = max_steps.element_handle()
    max_steps.select_text()
    # Leaving Rank updates the plan, which replaces the field
    page.wait_for_function("field => !field.isConnected", arg=old_field)
    page.keyboard.type("12")
    expect(max_steps).to_have_value("12")


def test_a_removed_lock_restores_the_planned_value(page, instance):
    page.goto(instance.address + "/runs/new")
    choose_model_and_data(page)
    rank = page.get_by_label("Rank")
    expect(rank).to_be_visible(timeout=120_000)
    planned = rank.input_value()
    rank.fill("3")
    box = page.locator("#lock-rank")
    expect(box).to_be_checked()
    box.uncheck()
    expect(rank).to_have_value(planned)


def test_trials_are_listed_and_the_selected_one_continues(page, instance):
    page.goto(instance.address + "/data")
    page.get_by_role("button", name="Use smart home").click()
    page.get_by_role("link", name="New run with this").click(timeout=150_000)
    page.locator("#model").select_option(label="tiny-llama")
    expect(page.locator("ol.plan")).to_be_visible(timeout=120_000)
    page.get_by_label("Max steps").fill("16")
    page.get_by_label("Tuning budget", exact=True).fill("1.5")
    expect(page.locator("ol.plan li.locked")).to_have_count(2)
    expect(page.locator("#summary")).to_contain_text(
        re.compile(r"\b16,\s+\d+ evaluations"), timeout=90_000
    )
    wait_for_summary(page)
    page.get_by_role("button", name=re.compile("Start run|Start anyway")).click(timeout=150_000)
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    expect(page.locator("[data-trials]")).to_contain_text("planned settings", timeout=150_000)
    expect(page.locator("[data-live=label]")).to_have_text("Finished", timeout=180_000)
    rows = page.locator("[data-trials] tbody tr")
    assert rows.count() >= 3
    expect(page.locator("[data-trials] tbody tr.best")).to_contain_text("selected")
    expect(page.locator("[data-verdict]")).to_contain_text("the planned settings")
    expect(page.locator("[data-live=step]")).to_have_text("16 / 16")
    expect(page.locator("[data-parallel] .main-svg").first).to_be_visible()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_launched(page, instance, name):
    open_manual_form(page, instance)
    choose_model_and_data(page)
    page.locator(f"#method-{name}").check()
    expect(page.locator(f"[data-settings-of={name}]")).to_be_visible()
    page.get_by_text("Advanced").click()
    for field, value in {
        "max_steps": 6,
        "max_tokens_per_batch": 160,
        "max_length": 80,
        "eval_steps": 3,
        "save_steps": 3,
    }.items():
        page.locator(f"[name={field}]").fill(str(value))
    expect(page.locator("#summary")).to_contain_text(
        re.compile(r"\b6,\s+\d+ evaluations"), timeout=150_000
    )
    expect(page.locator("#summary dl")).to_contain_text(METHODS[name].title)
    start_and_finish(page)


def test_a_summary_that_is_refreshed_during_a_click_keeps_the_click(page, instance):
    open_manual_form(page, instance)
    choose_model_and_data(page)
    page.get_by_text("Advanced").click()
    page.locator("[name=max_steps]").fill("6")
    expect(page.locator("#summary")).to_contain_text(
        re.compile(r"\b6,\s+\d+ evaluations"), timeout=90_000
    )
    button = page.get_by_role("button", name=re.compile("Start run|Start anyway"))
    expect(button).to_be_enabled(timeout=150_000)
    button.hover()
    page.mouse.down()
    with page.expect_response(re.compile("/runs/new/summary")):
        page.evaluate("htmx.trigger(document.body, 'measured')")
    page.wait_for_timeout(500)
    page.mouse.up()
    page.wait_for_url(re.compile(r"/runs/\d+$"))


def test_a_method_chosen_during_other_requests_shows_its_settings(page, instance):
    open_manual_form(page, instance)
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 600, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    choose_model_and_data(page)
    page.locator("#method-prefix").check()
    # Requests the summary while the settings are being requested
    page.locator("[name=max_steps]").fill("6")
    expect(page.locator("[name=num_virtual_tokens]")).to_be_visible()
    expect(page.locator("[name=max_steps]")).to_have_value("6")
    page.locator("#method-bottleneck").check()  # and a second one, too
    expect(page.locator("[data-settings-of=bottleneck]")).to_be_visible()
    expect(page.locator("#summary")).to_contain_text(
        re.compile(r"\b6,\s+\d+ evaluations"), timeout=90_000
    )
