"""The instance that benchmarks/abuse.py attacks: its users, models and versions, and how it is
measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil

from tests.running_site import RunningSite

SETUP = """
import json, sys, django
django.setup()
from pathlib import Path
from adapters.models import AdapterVersion
from tests import tiny
from training.catalog.models import BaseModel
from training.datasets.models import Dataset
from training.people.models import Team, User
from training.people.teams import add_member
from training.people.tokens import create_token
team = Team.objects.create(name="all")
users = [User.objects.get(username="alice")]
users += [User.objects.create_user(name, password="tulip-river-42") for name in ("flood", "other")]
for user in users:
    add_member(user, team, "member")
Dataset.objects.update(team=team)
tiny_llama = BaseModel.objects.get(name="tiny-llama")
def add_base(folder):
    return BaseModel.objects.create(
        name=Path(folder).name, state="ready", source="folder", location=folder,
        metadata=tiny_llama.metadata,
    )
def add_version(name, base, size):
    version = AdapterVersion.objects.create(
        owner=users[1], team=team, name=name, number=1, base_model=base, method="lora", step=1,
        sha256="a", size_bytes=size,
        files={"adapter_model.safetensors": {"sha256": "a", "bytes": size}},
    )
    version.folder.mkdir(parents=True)
    with (version.folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(size)
    return version.pk
print(json.dumps({
    "tokens": [create_token(user, "abuse")[1] for user in users],
    "large": add_version("Large", tiny_llama, 400 * 2**20),
    "templates": [
        [base.name, base.pk, add_version(base.name, base, 1)]
        for base in map(add_base, sys.argv[1:])
    ],
}))
"""

SEED_RUNS = """
import sys, django
django.setup()
from datetime import timedelta
from django.utils import timezone
from training.people.models import User
from training.runs.models import Run
run = Run.objects.order_by("pk").first()
fields = {
    field.attname: getattr(run, field.attname)
    for field in Run._meta.concrete_fields if field.attname != "id"
} | {"state": "queued", "lease_token": "", "finished_at": None}
owners = [User.objects.create_user(f"user-{n}") for n in range(100)]
Run.objects.bulk_create([
    Run(**fields | {
        "owner_id": owners[number % 100].pk, "name": f"run {number}",
        "queued_at": timezone.now() - timedelta(seconds=number),
    })
    for number in range(10_000)
], batch_size=500)
"""


class Client:
    """The API as one user, with a token."""

    def __init__(self, site: RunningSite, token: str) -> None:
        self.address, self.headers = site.address, {"Authorization": f"Bearer {token}"}

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(
            method, self.address + path, headers=self.headers, timeout=300, **options
        )


@contextmanager
def watch_web(site: RunningSite) -> Iterator[dict[str, float]]:
    """Fills in the growth of the web server's memory in MB, and the most processes that ran at a
    time below the web server and the worker, without themselves.
    """
    web, worker = (psutil.Process(site.find_pid(name)) for name in ("web", "worker"))
    start_bytes, figures = web.memory_info().rss, {"growth_mb": 0.0, "processes": 0.0}
    is_done = threading.Event()

    def watch() -> None:
        seconds: dict[int, float] = {}
        while not is_done.wait(0.25):
            growth = (web.memory_info().rss - start_bytes) / 1e6
            running = 0
            for process in (*web.children(recursive=True), *worker.children(recursive=True)):
                try:
                    used = sum(process.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue
                # A process that is new may have replaced one that has just ended
                running += used > seconds.get(process.pid, used) + 0.02
                seconds[process.pid] = used
            figures["growth_mb"] = max(figures["growth_mb"], growth)
            figures["processes"] = max(figures["processes"], running)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield figures
    finally:
        is_done.set()
        thread.join()


def measure_seconds(action: Callable[[], Any]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def sign_in(site: RunningSite, name: str) -> httpx.Cookies:
    """The session of a user, as a browser gets it."""
    with httpx.Client(base_url=site.address) as browser:
        page = browser.get("/sign-in").text
        token = page.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
        form = {"username": name, "password": "tulip-river-42", "csrfmiddlewaretoken": token}
        browser.post("/sign-in", data=form, headers={"Referer": site.address})
        return browser.cookies


def train_and_deploy(site: RunningSite, owner: Client) -> tuple[int, int]:
    """Train and deploy a tiny adapter as `lights`. Returns the ids of the run and the version."""
    settings = {"max_steps": 60, "max_length": 80, "eval_steps": 5}
    body = {"model": 1, "data": 1, "settings": settings, "accept_warnings": True}
    run = int(owner.send("POST", "/api/v1/runs", json=body).json()["id"])
    site.wait_for(
        lambda: owner.send("GET", f"/api/v1/runs/{run}").json()["state"]["state"] == "finished",
        300,
    )
    versions = owner.send("GET", "/api/v1/adapters").json()["items"]
    version = next(item["id"] for item in versions if item["base_model"] and item.get("run") == run)
    answer = owner.send("POST", "/api/v1/deployments", json={"name": "lights", "version": version})
    assert answer.status_code == 201, answer.text
    return run, version
