"""Fill in the launch page as a user does."""

import re

from playwright.sync_api import expect


def choose_model_and_data(page, data="Lights"):
    """Select the tiny model, and the first version of a dataset by its name."""
    page.locator("#model").select_option(label="tiny-llama")
    option = page.locator("#data option", has_text=f"{data} v1")
    page.locator("#data").select_option(option.first.get_attribute("value"))


def open_manual_form(page, instance, query=""):
    page.goto(f"{instance.address}/runs/new{query}")
    page.get_by_role("radio", name="Manual").check()
    expect(page.get_by_text("Advanced")).to_be_visible(timeout=90_000)


def wait_for_summary(page):
    """The summary follows 200 ms after the last key. A run is only launched with the warnings that
    it shows.
    """
    page.wait_for_timeout(300)
    expect(page.locator("#launch.htmx-request")).to_have_count(0, timeout=150_000)


def launch_run_from_page(page, instance, name, data="Lights", **settings):
    open_manual_form(page, instance)
    values = {
        "name": name,
        "max_steps": 12,
        "max_tokens_per_batch": 160,
        "max_length": 80,
        "eval_steps": 4,
        "save_steps": 4,
    }
    page.get_by_text("Advanced").click()
    choose_model_and_data(page, data)
    for field, value in (values | settings).items():
        page.locator(f"[name={field}]").fill(str(value))
    expect(page.get_by_text("counting tokens")).to_have_count(0, timeout=150_000)
    wait_for_summary(page)
    page.get_by_role("button", name=re.compile("Start run|Start anyway")).click()
    page.wait_for_url(re.compile(r"/runs/\d+$"))
