"""A newcomer's path: clone into an empty folder, `make run`, and fine-tune the real model in the
browser.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.chromium import find_chromium, launch_browser
from tests.running_site import ROOT, find_free_port

# Folder for the screenshots of the README
SCREENSHOT_FOLDER = Path(os.environ["SNAPML_SHOTS"]) if "SNAPML_SHOTS" in os.environ else None
NEW_PASSWORD = "tulip-river-42"


@pytest.fixture
def clone(tmp_path):
    """A clone of the last commit, in an empty folder."""
    folder = tmp_path / "snapml"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture
def running(clone):
    """`make run` in the clone; yields its URL and the one-time password."""
    port, log = find_free_port(), clone / "run.log"
    bare = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SNAPML_", "DJANGO_", "DATABASE_", "REDIS_", "VIRTUAL_", "OMP_"))
    }
    with log.open("w") as out:
        up = subprocess.Popen(
            ["make", "run", f"PORT={port}"],
            cwd=clone,
            env=bare,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    end = time.monotonic() + 900
    while not (
        match := re.search(
            r"SnapML is at (\S+)\s+\(sign in as admin, one-time password (\S+)\)", log.read_text()
        )
    ):
        assert up.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.5)
    yield match.groups()
    os.killpg(up.pid, signal.SIGINT)
    up.wait(120)
    assert "Stopped." in log.read_text()


def take_screenshot(page, name):
    if SCREENSHOT_FOLDER:
        page.screenshot(path=SCREENSHOT_FOLDER / f"{name}.png")


@pytest.mark.slow
@pytest.mark.skipif(
    find_chromium() is None, reason="NO CHROMIUM FOUND: the newcomer test did not run"
)
def test_an_empty_folder_becomes_an_adapter_that_answers_in_the_trained_format(running):
    address, password = running
    with launch_browser() as chromium:
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.goto(address)
        page.get_by_label("Name").fill("admin")
        page.get_by_label("Password").fill(password)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label("Old password").fill(password)
        page.get_by_label("New password", exact=True).fill(NEW_PASSWORD)
        page.get_by_label("New password confirmation").fill(NEW_PASSWORD)
        page.get_by_role("button", name="Change password").click()

        page.goto(address + "models")
        expect(page.locator(".state.ready")).to_be_visible(timeout=180_000)
        page.goto(address + "data")
        page.get_by_role("button", name="Use smart home").click()
        expect(page.locator(".tokens .t").first).to_be_visible(timeout=120_000)
        page.wait_for_timeout(1500)
        take_screenshot(page, "data")
        page.get_by_role("link", name="New run with this").click()
        expect(page.get_by_label("Auto", exact=False).first).to_be_checked()
        expect(page.locator("ol.plan")).to_contain_text("LoRA fits", timeout=180_000)
        expect(page.locator("ol.plan")).to_contain_text("QLoRA would need")
        page.get_by_label("Max steps").fill("40")
        expect(page.locator("#summary")).to_contain_text(
            re.compile(r"\b40,\s+\d+ evaluations"), timeout=120_000
        )
        page.wait_for_timeout(500)
        take_screenshot(page, "new-run")
        page.get_by_role("button", name="Start run").click()

        live = page.locator("[data-live=label]")
        expect(live).to_have_text("Running", timeout=120_000)
        expect(page.locator("[data-live=step]")).to_have_text(
            re.compile(r"^(2\d|3\d) / 40$"), timeout=400_000
        )
        take_screenshot(page, "run-live")
        expect(live).to_have_text("Finished", timeout=400_000)
        page.wait_for_timeout(1000)
        expect(
            page.get_by_text(re.compile(r"forecast [\d.]+ [MG]B,\s+measured [\d.]+ [MG]B"))
        ).to_be_visible()
        expect(page.get_by_text("Exact match on held-out data")).to_be_visible()
        take_screenshot(page, "run-finished")

        page.get_by_role("link", name="Try it").click()
        page.get_by_label("Message").fill("turn on the kitchen lamp")
        page.get_by_role("button", name="Send").click()
        for who in ("base", "adapter"):
            expect(page.locator(f"[data-who={who}] [data-speed]")).to_contain_text(
                "tokens/s", timeout=180_000
            )
        take_screenshot(page, "try-it")
        reply_texts = {
            who: page.locator(f"[data-who={who}] .turn.assistant").inner_text()
            for who in ("base", "adapter")
        }
    answers = {who: text.removeprefix("assistant").strip() for who, text in reply_texts.items()}
    assert "intent" in json.loads(answers["adapter"])
    with pytest.raises(ValueError):
        json.loads(answers["base"])
