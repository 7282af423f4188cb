"""Running instances for the browser, and people in them."""

from tests import simulations
from tests.stage import RunningSite


def new_stage(tmp_path_factory, model):
    home = tmp_path_factory.mktemp("home")
    simulations.FOLDER.mkdir(parents=True, exist_ok=True)
    (home / "memory_estimators").symlink_to(simulations.FOLDER)
    return RunningSite(home, model)


def active_runs(stage):
    return [
        run["id"]
        for state in ("queued", "starting", "running", "stopping")
        for run in stage.call_api("GET", f"/runs?state={state}")["items"]
    ]


def stop_runs(stage):
    for run in active_runs(stage):
        stage.call_api("POST", f"/runs/{run}/stop", {"discard": True})
    stage.wait_for(lambda: not active_runs(stage))


def sign_in(page, stage, name="alice", password="tulip-river-42"):
    page.goto(stage.address + "/sign-in")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(stage.address + "/")
