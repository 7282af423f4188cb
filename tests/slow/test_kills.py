"""kill -9 of engine, worker, web server, and all three, at random moments: the run goes on by itself, and its losses are the
same to the bit as without the kill; no event is lost or stored twice."""

import os
import random
import subprocess
import sys
import time
from itertools import pairwise

import httpx
import pytest

from tests import tiny
from tests.stage import ROOT, Stage
from training.engine.files import sha256
from training.engine.outcome import read_result

SETTINGS = {**tiny.SETTINGS, "max_steps": 2500, "save_interval": 25, "eval_interval": 125, "dropout": 0.1}
ENDED = ("finished", "failed", "stopped", "cancelled")


def undisturbed(folder, model):
    """Losses and adapter of the same run without a kill, from the shell."""
    run = tiny.make_run(folder, model, **SETTINGS)
    for name in ("train", "heldout"):  # the rows that the site would train on
        (run / f"{name}.jsonl").write_bytes(next((folder.parent / "home" / "data").glob(f"*/{name}.jsonl")).read_bytes())
    subprocess.run([sys.executable, "-m", "training.engine", str(run)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert read_result(run).step == SETTINGS["max_steps"]
    losses = {str(step): loss for step, loss in tiny.losses(tiny.events(run)).items()}
    return losses, sha256(run / "adapter" / "adapter_model.safetensors")


def state(stage, run_id):
    try:
        return stage.api("GET", f"/runs/{run_id}")["state"]
    except (httpx.HTTPError, ValueError):
        return None  # the web server was killed; it is started again


def launch(stage):
    while True:
        try:
            return stage.api("POST", "/runs", {"model": 1, "data": 1, "settings": SETTINGS, "accept_warnings": True})["id"]
        except (httpx.HTTPError, ValueError):
            time.sleep(0.2)


def survive(tmp_path, model, kills):
    """Kill `kills` times, over as many runs as that takes; every run must end as if nothing had been."""
    seed = int(os.environ.get("SNAPML_CHAOS_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    print(f"\n{kills} kills, seed {seed}")
    home = tmp_path / "home"
    home.mkdir()
    done, counts, attempts, runs, began = 0, {}, 0, 0, time.monotonic()
    with Stage(home, model, SNAPML_MAX_DEATHS="1000") as stage:
        losses, weights = undisturbed(tmp_path / "undisturbed", model)
        while done < kills:
            run_id = launch(stage)
            runs += 1
            while (now := state(stage, run_id)) is None or now["state"] not in ENDED:
                time.sleep(draw.uniform(0.2, 8.0) if done < kills else 0.5)
                now = state(stage, run_id)
                if done >= kills or now is None or now["state"] in ENDED:
                    continue
                victim = draw.choice(["engine", "worker", "web", "all"])
                names = ["engine", "worker", "web"] if victim == "all" else [victim]
                stage.kill(*[f"engine:{run_id}" if name == "engine" else name for name in names])
                counts[victim] = counts.get(victim, 0) + 1
                done += 1
            assert now["state"] == "finished", now
            found = stage.read_back(run_id)
            attempts += found["attempts"]
            assert found["seqs"] == list(range(1, found["last_seq"] + 1))
            assert found["losses"] == losses
            assert found["points"] == SETTINGS["max_steps"]
            assert found["sha256"] == weights
            assert all(one[1] is not None for one in found["held"])  # every device is given back
            assert all(one[1] <= other[0] for one, other in pairwise(found["held"])), found["held"]  # and none was held twice
    print(
        f"{done} kills {counts}, {runs} runs, {attempts} attempts, {time.monotonic() - began:.0f} s: every loss the same to the bit"
    )


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, tiny_model):
    survive(tmp_path, tiny_model, 20)


@pytest.mark.chaos
def test_two_hundred_random_kills(tmp_path, tiny_model):
    survive(tmp_path, tiny_model, 200)
