"""kill -9 of engine, worker, web server, and all three, a worker that stands still for 60 s,
doorbells lost and rung twice, at random moments: the run goes on by itself, and its losses are the
same to the bit as without; no event is lost or stored twice.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import httpx
import pytest

from tests import tiny
from tests.running_site import ROOT, RunningSite
from training.engine.files import sha256_file
from training.engine.outcome import read_result

SETTINGS = {
    **tiny.SETTINGS,
    "max_steps": 2500,
    "save_steps": 25,
    "eval_steps": 125,
    "dropout": 0.1,
}
ENDED = ("finished", "failed", "stopped", "cancelled")
# Twice a lease, three times a leash: the engine has left and another worker has taken over
FROZEN_SECONDS = 60
ROUND = ["freeze", "lose", "lose", "double", "double"]  # of twenty; the others are kills
KILLS = ["engine", "worker", "web", "all"]

QUEUE_FAULTS = {
    "lose": """
import django
django.setup()
from django.conf import settings
settings.HUEY.storage.flush_queue()
""",
    "double": """
import sys, django
django.setup()
from training.runs.worker import tasks
tasks.enqueue_supervision(int(sys.argv[1]))
tasks.enqueue_supervision(int(sys.argv[1]))
""",
}

LEASE_OWNERS_CODE = """
import json, django
django.setup()
from training.runs.models import Run
from training.runs.states import ACTIVE
print(json.dumps(dict(Run.objects.filter(state__in=ACTIVE).values_list("pk", "lease_owner"))))
"""


class Freezer:
    """Stops the worker for a while, with a second one beside it; then lets it go on, and kills the
    second one.
    """

    def __init__(self, stage):
        self.stage, self.thread, self.thawed = stage, None, threading.Event()
        self.freeze_count, self.takeover_count, self.unclaimed_runs = (
            0,
            0,
            [],
        )  # runs of a worker that stood still

    def freeze(self):
        self.thaw()
        self.stage.wait_for(lambda: self.stage.find_pid("worker"))
        self.thread = threading.Thread(
            target=self.suspend_worker, args=(self.stage.find_pid("worker"),), daemon=True
        )
        self.thread.start()

    def suspend_worker(self, pid):
        command = [sys.executable, "manage.py", "worker"]
        os.kill(pid, signal.SIGSTOP)
        with subprocess.Popen(
            command, cwd=ROOT, env=self.stage.env, stdout=self.stage.log, stderr=self.stage.log
        ) as second:
            try:
                before = self.list_watched_runs(pid)
                if not self.thawed.wait(FROZEN_SECONDS):
                    after = self.list_watched_runs(pid)
                    self.takeover_count += len(before - after)
                    self.unclaimed_runs += before & after
                    self.freeze_count += 1
            finally:
                with suppress(ProcessLookupError):  # `worker` may have been killed meanwhile
                    os.kill(pid, signal.SIGCONT)
                time.sleep(5)  # both watch for a moment: the one must find out that it may not
                second.kill()

    def list_watched_runs(self, pid):
        """The runs whose lease this worker holds."""
        owners = json.loads(self.stage.run_python(LEASE_OWNERS_CODE))
        return {run for run, owner in owners.items() if str(pid) in owner.split(":")}

    def thaw(self):
        """Wait until nobody stands still."""
        if self.thread:
            self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thawed.set()
        self.thaw()


def apply_disturbance(stage, freezer, disturbance, run_id):
    if disturbance == "freeze":
        freezer.freeze()
    elif disturbance in QUEUE_FAULTS:
        freezer.thaw()  # it may stand still with the queue's lock in its hands
        stage.run_python(QUEUE_FAULTS[disturbance], run_id)
    else:
        names = ["engine", "worker", "web"] if disturbance == "all" else [disturbance]
        stage.kill_processes(*[f"engine:{run_id}" if name == "engine" else name for name in names])


def draw_disturbances(draw, times):
    """What is done to the site, in a random order."""
    disturbances = ROUND * (times // 20)
    disturbances += [draw.choice(KILLS) for _ in range(times - len(disturbances))]
    draw.shuffle(disturbances)
    return disturbances


def train_undisturbed(folder, model):
    """Losses and adapter of the same run without a kill, from the shell."""
    run = tiny.make_run(folder, model, **SETTINGS)
    for name in ("train", "eval"):  # the rows that the site would train on
        (run / f"{name}.jsonl").write_bytes(
            next((folder.parent / "home" / "data").glob(f"*/{name}.jsonl")).read_bytes()
        )
    subprocess.run(
        [sys.executable, "-m", "training.engine", str(run)],
        cwd=ROOT,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    assert read_result(run).step == SETTINGS["max_steps"]
    losses = {str(step): loss for step, loss in tiny.get_step_losses(tiny.read_events(run)).items()}
    return losses, sha256_file(run / "adapter" / "adapter_model.safetensors")


def get_state(stage, run_id):
    try:
        return stage.call_api("GET", f"/runs/{run_id}")["state"]
    except (httpx.HTTPError, ValueError):
        return None  # the web server was killed; it is started again


def launch_run(stage):
    while True:
        try:
            return stage.call_api(
                "POST",
                "/runs",
                {"model": 1, "data": 1, "settings": SETTINGS, "accept_warnings": True},
            )["id"]
        except (httpx.HTTPError, ValueError):
            time.sleep(0.2)


def check_survival(tmp_path, model, times):
    """Disturb it so many times, over as many runs as that takes; every run must end as if nothing
    had been.
    """
    seed = int(os.environ.get("SNAPML_CHAOS_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    print(f"\n{times} disturbances, seed {seed}")
    home = tmp_path / "home"
    home.mkdir()
    pending, attempts, runs, started_at = draw_disturbances(draw, times), 0, 0, time.monotonic()
    counts = Counter()
    with RunningSite(home, model, SNAPML_MAX_CRASHES="1000") as stage, Freezer(stage) as freezer:
        losses, weights = train_undisturbed(tmp_path / "undisturbed", model)
        while pending:
            run_id = launch_run(stage)
            runs += 1
            while (now := get_state(stage, run_id)) is None or now["state"] not in ENDED:
                time.sleep(draw.uniform(0.2, 8.0) if pending else 0.5)
                now = get_state(stage, run_id)
                if pending and now is not None and now["state"] not in ENDED:
                    disturbance = pending.pop()
                    apply_disturbance(stage, freezer, disturbance, run_id)
                    counts[disturbance] += 1
            freezer.thaw()
            stage.wait_for(lambda run_id=run_id: get_state(stage, run_id) is not None)
            now = get_state(stage, run_id)
            assert now["state"] == "finished", now  # also for a worker that stood still meanwhile
            recorded = stage.read_run(run_id)
            attempts += recorded["attempts"]
            assert recorded["seqs"] == list(range(1, recorded["last_seq"] + 1))
            assert recorded["losses"] == losses
            assert recorded["points"] == SETTINGS["max_steps"]
            assert recorded["sha256"] == weights
            assert all(one[1] is not None for one in recorded["held"])  # every device is given back
            # And none was held twice
            assert all(one[1] <= other[0] for one, other in pairwise(recorded["held"])), recorded[
                "held"
            ]
    assert freezer.freeze_count == counts["freeze"]
    assert not freezer.unclaimed_runs, "another worker takes over what a frozen one watched"
    print(
        f"{dict(counts)}, {freezer.takeover_count} taken over, {runs} runs, {attempts} attempts, "
        f"{time.monotonic() - started_at:.0f} s: every loss the same to the bit"
    )


@pytest.mark.slow
def test_twenty_disturbances(tmp_path, tiny_model):
    check_survival(tmp_path, tiny_model, 20)


@pytest.mark.chaos
def test_two_hundred_disturbances(tmp_path, tiny_model):
    check_survival(tmp_path, tiny_model, 200)
