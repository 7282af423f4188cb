"""Kills the engine, the worker, the web server or all of them (kill -9), freezes a worker for 60 s,
and loses and duplicates queue messages, at random moments. Every run recovers on its own with
bit-identical losses, and no event is lost or stored twice.
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
# Twice a lease and three times the heartbeat timeout: the engine has exited and another worker has
# claimed the run
FROZEN_SECONDS = 60
TAKEOVER_SECONDS = 90  # more, if the second worker starts slowly on a busy machine
ROUND = ["freeze", "lose", "lose", "double", "double"]  # of 20 disturbances; the others are kills
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
    """Suspends the worker for a while with SIGSTOP, with a second worker running. Then resumes it
    and kills the second one. Runs in a thread of its own, which `thaw` joins.
    """

    def __init__(self, site):
        self.site, self.thread, self.thawed = site, None, threading.Event()
        self.freeze_count, self.takeover_count = 0, 0
        self.unclaimed_runs = []  # runs that no other worker claimed during a freeze

    def freeze(self):
        self.thaw()
        self.site.wait_for(lambda: self.site.find_pid("worker"))
        self.thread = threading.Thread(
            target=self.suspend_worker, args=(self.site.find_pid("worker"),), daemon=True
        )
        self.thread.start()

    def suspend_worker(self, pid):
        command = [sys.executable, "manage.py", "worker"]
        os.kill(pid, signal.SIGSTOP)
        with subprocess.Popen(
            command, cwd=ROOT, env=self.site.env, stdout=self.site.log, stderr=self.site.log
        ) as second:
            try:
                before = self.list_watched_runs(pid)
                if not self.thawed.wait(FROZEN_SECONDS):
                    after = self.list_watched_runs(pid)
                    deadline = time.monotonic() + TAKEOVER_SECONDS
                    while before & after and time.monotonic() < deadline:
                        self.thawed.wait(5)
                        after = self.list_watched_runs(pid)
                    self.takeover_count += len(before - after)
                    self.unclaimed_runs += before & after
                    self.freeze_count += 1
            finally:
                with suppress(ProcessLookupError):  # `worker` may have been killed meanwhile
                    os.kill(pid, signal.SIGCONT)
                # Both run for a moment: the resumed worker must notice that it lost its leases
                time.sleep(5)
                second.kill()

    def list_watched_runs(self, pid):
        """The runs whose lease this worker holds."""
        owners = json.loads(self.site.run_python(LEASE_OWNERS_CODE))
        return {run for run, owner in owners.items() if str(pid) in owner.split(":")}

    def thaw(self):
        """Wait until no worker is suspended."""
        if self.thread:
            self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thawed.set()
        self.thaw()


def apply_disturbance(site, freezer, disturbance, run_id):
    if disturbance == "freeze":
        freezer.freeze()
    elif disturbance in QUEUE_FAULTS:
        freezer.thaw()  # a suspended worker may hold the queue's lock
        site.run_python(QUEUE_FAULTS[disturbance], run_id)
    else:
        names = ["engine", "worker", "web"] if disturbance == "all" else [disturbance]
        site.kill_processes(*[f"engine:{run_id}" if name == "engine" else name for name in names])


def draw_disturbances(draw, times):
    """Disturbances of the site, in random order."""
    disturbances = ROUND * (times // 20)
    disturbances += [draw.choice(KILLS) for _ in range(times - len(disturbances))]
    draw.shuffle(disturbances)
    return disturbances


def train_undisturbed(folder, model):
    """Losses and adapter digest of the same run without disturbances, trained from the shell."""
    run = tiny.make_run(folder, model, **SETTINGS)
    for name in ("train", "eval"):  # the same rows as on the site
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


def get_state(site, run_id):
    try:
        return site.call_api("GET", f"/runs/{run_id}")["state"]
    except (httpx.HTTPError, ValueError):
        return None  # the web server was killed and is restarting


def launch_run(site):
    while True:
        try:
            return site.call_api(
                "POST",
                "/runs",
                {"model": 1, "data": 1, "settings": SETTINGS, "accept_warnings": True},
            )["id"]
        except (httpx.HTTPError, ValueError):
            time.sleep(0.2)


def check_survival(tmp_path, model, times):
    """Disturb the site `times` times, over as many runs as needed. Every run must end like an
    undisturbed one.
    """
    seed = int(os.environ.get("SNAPML_CHAOS_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    print(f"\n{times} disturbances, seed {seed}")
    home = tmp_path / "home"
    home.mkdir()
    pending, attempts, runs, started_at = draw_disturbances(draw, times), 0, 0, time.monotonic()
    counts = Counter()
    with RunningSite(home, model, SNAPML_MAX_CRASHES="1000") as site, Freezer(site) as freezer:
        losses, weights = train_undisturbed(tmp_path / "undisturbed", model)
        while pending:
            run_id = launch_run(site)
            runs += 1
            while (now := get_state(site, run_id)) is None or now["state"] not in ENDED:
                time.sleep(draw.uniform(0.2, 8.0) if pending else 0.5)
                now = get_state(site, run_id)
                if pending and now is not None and now["state"] not in ENDED:
                    disturbance = pending.pop()
                    apply_disturbance(site, freezer, disturbance, run_id)
                    counts[disturbance] += 1
            freezer.thaw()
            # get_state is None while the web server restarts
            site.wait_for(lambda run_id=run_id: get_state(site, run_id) is not None)
            now = get_state(site, run_id)
            assert now["state"] == "finished", now
            recorded = site.read_run(run_id)
            attempts += recorded["attempts"]
            assert recorded["seqs"] == list(range(1, recorded["last_seq"] + 1))
            assert recorded["losses"] == losses
            assert recorded["points"] == SETTINGS["max_steps"]
            assert recorded["sha256"] == weights
            # Every device is released
            assert all(one[1] is not None for one in recorded["allocations"])
            # Allocations do not overlap
            assert all(one[1] <= other[0] for one, other in pairwise(recorded["allocations"])), (
                recorded["allocations"]
            )
    assert freezer.freeze_count == counts["freeze"]
    assert not freezer.unclaimed_runs, "another worker claims the runs of a frozen one"
    print(
        f"{dict(counts)}, {freezer.takeover_count} takeovers, {runs} runs, {attempts} attempts, "
        f"{time.monotonic() - started_at:.0f} s: all losses bit-identical"
    )


@pytest.mark.slow
def test_twenty_disturbances(tmp_path, tiny_model):
    check_survival(tmp_path, tiny_model, 20)


@pytest.mark.chaos
def test_two_hundred_disturbances(tmp_path, tiny_model):
    check_survival(tmp_path, tiny_model, 200)
