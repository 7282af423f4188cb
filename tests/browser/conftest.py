"""A running SnapML with a tiny model, and a browser. Without a Chromium these tests are left out,
and say so loudly.
"""

import warnings

import pytest
from playwright.sync_api import expect

from tests.browser.chromium import browser, chromium_path
from tests.browser.instances import new_stage, sign_in, stop_runs

# The server shares two cores with the engine, the browser and simulated steps
expect.set_options(timeout=40_000)
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
def shared_stage(tmp_path_factory, tiny_model):
    with new_stage(tmp_path_factory, tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def stage(shared_stage):
    """One instance for the modules of this process: a test makes what it changes, and finds it by
    its number or name. No module's runs hold the device of the next one.
    """
    stop_runs(shared_stage)
    yield shared_stage
    stop_runs(shared_stage)


@pytest.fixture(scope="module")
def session_of_alice(chromium, stage):
    """Cookies of one sign-in, for every test's own context."""
    context = chromium.new_context()
    sign_in(context.new_page(), stage)
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def page(chromium, stage, session_of_alice):
    """A signed-in page that fails the test if anything is written to the console as an error."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 900}, storage_state=session_of_alice
    )
    made = context.new_page()
    complaints = []
    made.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.complaints = complaints
    yield made
    context.close()
    assert complaints == []
