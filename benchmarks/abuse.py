"""Attack an instance from outside, through HTTP and WebSockets only, and measure what another user
notices.

    python benchmarks/abuse.py [--json]

A new instance with a tiny model is started like `manage.py up` starts it. One user, `flood`,
attacks; another one, `other`, works. Memory is that of the web server's process, minus what it had
before the attack. A process counts as running while it uses CPU time. Every loop is bounded.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report
from benchmarks.web_sockets import open_socket, send_frame
from tests import tiny
from tests.running_site import RunningSite

MIB = 2**20
FLOOD_UPLOADS, FLOOD_REQUESTS, OTHER_REQUESTS, MAX_ANSWER_SECONDS = 30, 40, 12, 10.0
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"

SETUP = """
import json, sys, django
django.setup()
from adapters.models import AdapterVersion
from tests import tiny
from training.catalog.models import BaseModel
from training.datasets.models import Dataset
from training.people.models import Team, User
from training.people.teams import add_member
from training.people.tokens import create_token
team = Team.objects.create(name="all")
users = [User.objects.get(username="alice")]
users += [User.objects.create_user(name, password="x") for name in ("flood", "other")]
for user in users:
    add_member(user, team, "member")
Dataset.objects.update(team=team)
looping = BaseModel.objects.create(
    name="looping", state="ready", source="folder", location=sys.argv[1],
    metadata=BaseModel.objects.get(name="tiny-llama").metadata,
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
    "large": add_version("Large", BaseModel.objects.get(name="tiny-llama"), 400 * 2**20),
    "looping": add_version("Looping", looping, 1),
    "session_user": users[1].pk,
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
owners = [User.objects.create_user(f"user-{n}") for n in range(100)]
rows = []
for number in range(10_000):
    row = Run.objects.get(pk=run.pk) if not rows else rows[0].__class__(**{
        field.attname: getattr(run, field.attname)
        for field in Run._meta.concrete_fields if field.attname != "id"
    })
    row.pk, row.owner, row.state, row.name = None, owners[number % 100], "queued", f"run {number}"
    row.lease_token, row.finished_at = "", None
    row.queued_at = timezone.now() - timedelta(seconds=number)
    rows.append(row)
Run.objects.bulk_create(rows, batch_size=500)
"""


class Client:
    """The API as one user, with a token."""

    def __init__(self, stage: RunningSite, token: str) -> None:
        self.address, self.headers = stage.address, {"Authorization": f"Bearer {token}"}

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(
            method, self.address + path, headers=self.headers, timeout=120, **options
        )


@contextmanager
def watch_web(stage: RunningSite) -> Iterator[dict[str, float]]:
    """Fills in the growth of the web server's memory in MB, and the most processes that ran at a
    time below the web server and the worker, without themselves.
    """
    web, worker = (psutil.Process(stage.find_pid(name)) for name in ("web", "worker"))
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


def upload_rows(client: Client, name: str) -> httpx.Response:
    rows = "\n".join(json.dumps({"prompt": f"{name} {n}", "completion": "b"}) for n in range(200))
    return client.send("POST", "/api/v1/datasets/uploads", data={"rows": rows, "name": name})


def flood_uploads(stage: RunningSite, flood: Client, other: Client) -> dict[str, Any]:
    with watch_web(stage) as figures, ThreadPoolExecutor(FLOOD_UPLOADS) as pool:
        for number in range(FLOOD_UPLOADS):
            pool.submit(upload_rows, flood, f"flood {number}")
        time.sleep(1)
        waited = measure_seconds(lambda: upload_rows(other, "other"))
    return {
        "processes_at_once": int(figures["processes"]),
        "uploads_growth_mb": figures["growth_mb"],
        "other_upload_s": waited,
    }


def leave_downloads_unread(stage: RunningSite, token: str, version: int) -> dict[str, Any]:
    head = (
        f"GET /api/v1/adapters/{version}/download HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()
    with watch_web(stage) as figures:
        connections = [socket.create_connection(("127.0.0.1", stage.port)) for _ in range(2)]
        for connection in connections:
            connection.sendall(head)
        time.sleep(8)
    for connection in connections:
        connection.close()
    return {"downloads_growth_mb": figures["growth_mb"]}


def subscribe_without_reading(stage: RunningSite, session: str, run: int) -> dict[str, Any]:
    """Ten sockets that subscribe to a run again and again and never read."""
    with watch_web(stage) as figures:
        connections = [open_socket(stage.port, session, buffer_bytes=4096) for _ in range(10)]
        for _ in range(40):
            for connection in connections:
                try:
                    send_frame(connection, {"type": "sub", "run": run, "cursor": 0, "points": 2000})
                except OSError:
                    pass  # the server has closed it
            time.sleep(0.2)
    for connection in connections:
        connection.close()
    return {"sockets_growth_mb": figures["growth_mb"]}


def flood_answers(flood: Client, other: Client) -> dict[str, Any]:
    """Another user asks while one user keeps FLOOD_REQUESTS long requests open."""
    body = {"model": "lights", "messages": [{"role": "user", "content": "turn on the lamp"}]}
    is_done = threading.Event()

    def keep_asking() -> None:
        while not is_done.is_set():
            flood.send("POST", "/v1/chat/completions", json=body | {"max_tokens": 200})

    answered = 0
    with ThreadPoolExecutor(FLOOD_REQUESTS) as pool:
        for _ in range(FLOOD_REQUESTS):
            pool.submit(keep_asking)
        time.sleep(3)
        for _ in range(OTHER_REQUESTS):
            start = time.monotonic()
            answer = other.send("POST", "/v1/chat/completions", json=body | {"max_tokens": 20})
            is_in_time = time.monotonic() - start < MAX_ANSWER_SECONDS
            answered += answer.status_code == 200 and is_in_time
        is_done.set()
    return {"others_answered": answered}


def measure_template_recovery(flood: Client, other: Client, version: int) -> dict[str, Any]:
    """Seconds until another user's request is answered, after a request for a model whose chat
    template never ends.
    """
    body = {"who": "base", "messages": [{"role": "user", "content": "hi"}]}
    thread = threading.Thread(
        target=flood.send, args=("POST", f"/api/v1/adapters/{version}/try"), kwargs={"json": body}
    )
    thread.start()
    time.sleep(0.5)
    question = {"model": "lights", "messages": body["messages"], "max_tokens": 5}
    seconds = measure_seconds(lambda: other.send("POST", "/v1/chat/completions", json=question))
    thread.join()
    return {"template_recovery_s": seconds}


def sign_in(stage: RunningSite) -> str:
    """The session of alice, as a browser gets it."""
    with httpx.Client(base_url=stage.address) as browser:
        page = browser.get("/sign-in").text
        token = page.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
        form = {"username": "alice", "password": "tulip-river-42", "csrfmiddlewaretoken": token}
        browser.post("/sign-in", data=form, headers={"Referer": stage.address})
        return str(browser.cookies["snapml_session"])


def train_and_deploy(stage: RunningSite, owner: Client) -> int:
    """Train and deploy a tiny adapter as `lights`. Returns the run's id."""
    settings = {"max_steps": 60, "max_length": 80, "eval_steps": 5}
    body = {"model": 1, "data": 1, "settings": settings, "accept_warnings": True}
    run = int(owner.send("POST", "/api/v1/runs", json=body).json()["id"])
    stage.wait_for(
        lambda: owner.send("GET", f"/api/v1/runs/{run}").json()["state"]["state"] == "finished",
        300,
    )
    versions = owner.send("GET", "/api/v1/adapters").json()["items"]
    version = next(item["id"] for item in versions if item["name"] not in ("Large", "Looping"))
    answer = owner.send("POST", "/api/v1/deployments", json={"name": "lights", "version": version})
    assert answer.status_code == 201, answer.text
    return run


def run_benchmark(stage: RunningSite, looping: Path) -> dict[str, Any]:
    setup = json.loads(stage.run_python(SETUP, looping))
    alice, flood, other = (Client(stage, token) for token in setup["tokens"])
    run = train_and_deploy(stage, alice)
    figures = {
        **flood_uploads(stage, flood, other),
        **leave_downloads_unread(stage, setup["tokens"][1], setup["large"]),
        **subscribe_without_reading(stage, sign_in(stage), run),
        **flood_answers(flood, other),
        **measure_template_recovery(flood, other, setup["looping"]),
    }
    figures["web_growth_mb"] = max(v for name, v in figures.items() if name.endswith("growth_mb"))
    stage.run_python(SEED_RUNS)
    body = {"model": 1, "data": 1, "settings": {"max_steps": 2}, "accept_warnings": True}
    seconds = [
        measure_seconds(lambda: other.send("POST", "/api/v1/runs", json=body)) for _ in range(5)
    ]
    return figures | {"launch_ms_10000": 1000 * max(seconds)}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="snapml-abuse-") as folder:
        home = Path(folder)
        model, looping = (
            tiny.make_model(home / "tiny-llama"),
            tiny.make_model(home / "looping", template=LOOP),
        )
        with RunningSite(home / "var", model) as stage:
            print_report(run_benchmark(stage, looping))


if __name__ == "__main__":
    main()
