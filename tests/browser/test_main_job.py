"""The main workflow in the browser with a tiny model: data, a run, the live curve, and a comparison
of base and adapter.
"""

import re

import pytest
from playwright.sync_api import expect

from tests import tiny
from tests.browser.launch_page import choose_model_and_data, launch_run_from_page, open_manual_form

pytestmark = pytest.mark.browser
POINTS = "() => document.getElementById('chart').data?.[1]?.x.length ?? 0"


def test_upload_train_watch_try_download(page, instance, tmp_path):
    page.goto(instance.address)
    main = page.get_by_role("navigation", name="Main")
    main.get_by_role("link", name="Data", exact=True).click()
    page.get_by_role("link", name="Upload data").first.click()
    bad = tmp_path / "lamps.jsonl"
    bad.write_bytes(
        b"".join(tiny.encode_jsonl(tiny.ROWS))
        + b'{"messages": [{"role": "robot", "content": "x"}]}\n'
    )
    page.get_by_label("File", exact=True).set_input_files(bad)
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("button", name=re.compile("Check file")).click()
    expect(
        page.get_by_text(
            "line 25, message 1: `role` is `robot`; expected system, user, assistant or tool"
        )
    ).to_be_visible(timeout=90_000)
    page.get_by_role("button", name="Save as a dataset").click()
    expect(
        page.get_by_text("Invalid rows: 1 of 25. Fix the file, or save without these rows.")
    ).to_be_visible()
    page.get_by_label("Skip 1 invalid row").check()
    page.get_by_role("button", name="Save as a dataset").click()
    expect(page.get_by_text("training rows")).to_be_visible(timeout=90_000)

    page.get_by_role("link", name="New run with this").click()
    launch_run_from_page(page, instance, "Lamps", data="lamps")
    expect(page.locator("[data-live=label]")).to_have_text("Finished", timeout=150_000)
    expect(page.locator("[data-live=step]")).to_have_text("12 / 12")
    expect(page.get_by_text("was saved")).to_be_visible()
    expect(page.locator(".sample")).to_have_count(4)
    assert page.evaluate(POINTS) == 12

    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="Random held-out prompt").click()
    expect(page.locator("[data-expected-text]")).not_to_be_empty()
    page.get_by_role("button", name="Send").click()
    for who in ("base", "adapter"):
        expect(page.locator(f"[data-who={who}] [data-speed]")).to_contain_text(
            "tokens/s", timeout=150_000
        )
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "Lamps-v1.zip"


def test_a_page_opened_late_or_reloaded_shows_the_complete_curve(page, instance):
    launch_run_from_page(
        page, instance, "Long", max_steps=100_000, eval_steps=100_000, save_steps=100
    )
    expect(page.locator("[data-live=label]")).to_have_text("Running", timeout=150_000)
    page.goto(instance.address + "/data")
    page.wait_for_timeout(1500)
    page.go_back()
    expect(page.locator("[data-connection]")).to_have_text("live")
    page.wait_for_timeout(1000)
    check_curve_complete(page)

    before = page.evaluate(POINTS)
    with instance.without_restarts():
        instance.kill_processes("web")
        expect(page.locator("[data-connection]")).to_contain_text("connection lost")
    expect(page.locator("[data-connection]")).to_have_text("live", timeout=90_000)
    page.wait_for_timeout(1500)
    check_curve_complete(page)
    assert page.evaluate(POINTS) > before
    page.console_errors.clear()  # the browser notes the refused connections

    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Keep training").click()
    expect(page.locator("[data-live=label]")).to_have_text("Running")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop and save").click()
    expect(page.locator("[data-live=label]")).to_have_text("Stopped", timeout=90_000)
    page.get_by_role("button", name="Resume from checkpoint").click()
    expect(page.locator("[data-live=label]")).to_have_text("Running", timeout=150_000)
    page.wait_for_timeout(1000)
    check_curve_complete(page)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop and discard").click()
    expect(page.locator("[data-live=label]")).to_have_text("Canceled", timeout=90_000)


def check_curve_complete(page):
    """The smoothed line has every step once, or buckets in order, from the first to the last."""
    steps = page.evaluate("() => document.getElementById('chart').data[1].x")
    assert steps == sorted(set(steps))
    raw = page.evaluate(
        "() => document.getElementById('chart').data[0].x.length === "
        "document.getElementById('chart').data[1].x.length"
    )
    if raw:
        assert steps == list(range(1, len(steps) + 1))


def test_contradictory_settings_give_an_error_and_keep_the_form(page, instance):
    open_manual_form(page, instance)
    choose_model_and_data(page)
    page.locator("[name=name]").fill("My careful run")
    page.locator("[name=max_length]").fill("512")
    page.locator("[name=max_tokens_per_batch]").fill("100")
    expect(page.locator("#summary")).to_contain_text(
        "max_tokens_per_batch is 100, but a single row can have max_length = 512"
    )
    expect(page.locator("#summary button")).to_have_text("Fix Tokens per batch")
    expect(page.locator("#summary button")).to_be_disabled()
    expect(page.locator("[name=name]")).to_have_value("My careful run")
    expect(page.locator("[name=max_tokens_per_batch]")).to_have_value("100")


def test_a_slider_changes_its_field_the_forecast_and_every_method(page, instance):
    open_manual_form(page, instance)
    choose_model_and_data(page)
    cost = page.locator("label:has(#method-lora) .number")
    expect(cost).to_contain_text("B: fits", timeout=150_000)
    expect(page.locator("#methods")).not_to_contain_text("simulating", timeout=150_000)
    first = cost.inner_text()
    slider = page.get_by_label("Rank slider")
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator("[name=rank]")).to_have_value("256")
    expect(page.locator("#summary")).to_contain_text("LoRA, rank 256")
    expect(cost).not_to_have_text(first)
    page.locator("[name=rank]").fill("8")
    expect(slider).to_have_value("3")
    expect(page.locator("#summary")).to_contain_text("LoRA, rank 8")


def test_the_launch_button_names_the_missing_input(page, instance):
    page.goto(instance.address + "/runs/new")
    button = page.locator("#summary button")
    choose_model_and_data(page)
    page.locator("#model").select_option("")
    expect(button).to_have_text("Choose a model")
    expect(button).to_be_disabled()
    page.locator("#model").select_option(label="tiny-llama")
    page.locator("#data").select_option("")
    expect(button).to_have_text("Choose data")


def test_a_dead_inference_program_is_reported_and_restarted(page, instance):
    launch_run_from_page(page, instance, "Small", max_steps=1)
    page.get_by_role("link", name="Try it").click(timeout=150_000)
    with instance.without_restarts():
        instance.kill_processes("inference")
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("[data-who=base]")).to_contain_text("The inference server is down")
    for _ in range(60):
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("[data-send]")).to_be_enabled(timeout=90_000)
        page.wait_for_timeout(1000)
        if "tokens/s" in page.locator("[data-who=base] [data-speed]").inner_text():
            return
    raise AssertionError("it did not come back")
