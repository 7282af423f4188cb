"""A running SnapML with a tiny model, and a browser. Without a Chromium these tests are left out,
and say so loudly.
"""

import warnings

import pytest
from playwright.sync_api import expect

from tests.browser.chromium import browser, chromium_path
from tests.stage import Stage

expect.set_options(
    timeout=40_000
)  # the server shares two cores with the engine, the browser and simulated steps
LEFT_OUT = (
    "NO CHROMIUM FOUND: the browser tests are left out. Install Debian's `chromium` and "
    "run them again."
)


def pytest_collection_modifyitems(items):
    if chromium_path() is None:
        warnings.warn(LEFT_OUT, stacklevel=1)
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=LEFT_OUT))


@pytest.fixture(scope="session")
def chromium():
    with browser() as made:
        yield made


@pytest.fixture(scope="session")
def laws(tmp_path_factory):
    """Simulated steps of the tiny model, seconds each: one module's serve the others."""
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model, laws):
    home = tmp_path_factory.mktemp("home")
    (home / "laws").symlink_to(laws)
    with Stage(home, tiny_model) as running:
        yield running


def sign_in(page, stage, name="alice", password="tulip-river-42"):
    page.goto(stage.address + "/sign-in")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(stage.address + "/")


@pytest.fixture
def page(chromium, stage):
    """A signed-in page that fails the test if anything is written to the console as an error."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    made = context.new_page()
    complaints = []
    made.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.complaints = complaints
    sign_in(made, stage)
    yield made
    context.close()
    assert complaints == []
