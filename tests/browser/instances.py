"""Running instances for the browser, and signing in to them."""

from tests import simulations
from tests.running_site import RunningSite


def start_instance(tmp_path_factory, model):
    home = tmp_path_factory.mktemp("home")
    simulations.FOLDER.mkdir(parents=True, exist_ok=True)
    (home / "memory_estimators").symlink_to(simulations.FOLDER)
    return RunningSite(home, model)


def active_runs(instance):
    return [
        run["id"]
        for state in ("queued", "starting", "running", "stopping")
        for run in instance.call_api("GET", f"/runs?state={state}")["items"]
    ]


def stop_runs(instance):
    for run in active_runs(instance):
        instance.call_api("POST", f"/runs/{run}/stop", {"discard": True})
    instance.wait_for(lambda: not active_runs(instance))


def sign_in(page, instance, name="alice", password="tulip-river-42"):
    page.goto(instance.address + "/sign-in")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(instance.address + "/")
