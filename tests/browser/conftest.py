"""A running SnapML with a tiny model, and a browser. Without Chromium these tests are skipped with
a warning.
"""

import warnings

import pytest
from playwright.sync_api import expect

from tests.browser.chromium import find_chromium, launch_browser
from tests.browser.instances import sign_in, start_instance, stop_runs

# The server shares two cores with the engine, the browser and simulated steps
expect.set_options(timeout=40_000)
SKIP_REASON = (
    "NO CHROMIUM FOUND: the browser tests are left out. Install Debian's `chromium` and "
    "run them again."
)


def pytest_collection_modifyitems(items):
    if find_chromium() is None:
        warnings.warn(SKIP_REASON, stacklevel=1)
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=SKIP_REASON))


@pytest.fixture(scope="session")
def chromium():
    with launch_browser() as launched:
        yield launched


@pytest.fixture(scope="session")
def shared_instance(tmp_path_factory, tiny_model):
    with start_instance(tmp_path_factory, tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def instance(shared_instance):
    """One instance for all modules of this process. A test creates its own objects and finds them
    by id or name. Active runs are stopped between modules, so that the device is free.
    """
    stop_runs(shared_instance)
    yield shared_instance
    stop_runs(shared_instance)


@pytest.fixture(scope="module")
def alice_session(chromium, instance):
    """The cookies of one sign-in, for the context of every test."""
    context = chromium.new_context()
    sign_in(context.new_page(), instance)
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def page(chromium, instance, alice_session):
    """A signed-in page that fails the test if an error is written to the console."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 900}, storage_state=alice_session
    )
    new_page = context.new_page()
    console_errors = []
    new_page.on(
        "console",
        lambda message: console_errors.append(message.text) if message.type == "error" else None,
    )
    new_page.on("pageerror", lambda error: console_errors.append(str(error)))
    new_page.console_errors = console_errors
    yield new_page
    context.close()
    assert console_errors == []
