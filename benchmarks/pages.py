"""Measure the list of runs with 2,000 runs: time to first byte and number of database queries."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report
from tests.running_site import RunningSite

RUNS, REPEATS = 2_000, 15
FILL = """
import sys, django
django.setup()
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.people.models import User
from training.runs.worker import tasks
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.models import Run
tasks.supervise_task = lambda _id: None
alice = User.objects.get(username="alice")
model, data = BaseModel.objects.get(), DatasetVersion.objects.get()
request = LaunchRequest(user=alice, base_model=model, data=data, settings={})
first = Run.objects.get(pk=launch_runs(request, accept_warnings=True).pk)
fields = {f.attname: getattr(first, f.attname) for f in Run._meta.concrete_fields}
states = ["finished", "failed", "stopped", "cancelled"]
runs = []
for number in range(int(sys.argv[1])):
    run = Run(**fields)
    run.pk, run.name, run.state = None, f"Run {number}", states[number % 4]
    run.sparkline, run.loss = [3.0, 2.0, 1.5] * 20, 1 / (number + 1)
    run.tags = f",tag {number % 7},"
    runs.append(run)
Run.objects.bulk_create(runs)
"""
QUERIES = """
import django
django.setup()
from django.conf import settings
settings.ALLOWED_HOSTS.append("testserver")
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from training.people.models import User
client = Client()
client.force_login(User.objects.get(username="alice"))
client.get("/")
with CaptureQueriesContext(connection, ) as queries:
    client.get("/")
print(len(queries))
"""
PAGES = {
    "runs_list": "/",
    "sorted": "/?sort=loss",
    "filtered": "/?state=failed&q=Run+1&tag=tag+3",
    "last_page": "/?page=40",
}


def first_byte(client: httpx.Client, path: str) -> float:
    began = time.monotonic()
    with client.stream("GET", path) as response:
        next(response.iter_raw())
        return (time.monotonic() - began) * 1000


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        from tests import tiny

        model = tiny.make_model(Path(home) / "tiny-llama")
        with RunningSite(Path(home), model) as stage:
            stage.run_python(FILL, RUNS)
            with httpx.Client(base_url=stage.address) as client:
                token = (
                    client.get("/sign-in")
                    .text.split('name="csrfmiddlewaretoken" value="')[1]
                    .split('"')[0]
                )
                form = {
                    "username": "alice",
                    "password": "tulip-river-42",
                    "csrfmiddlewaretoken": token,
                }
                client.post("/sign-in", data=form, headers={"Referer": stage.address})
                figures: dict[str, Any] = {}
                for name, path in PAGES.items():
                    times = [first_byte(client, path) for _ in range(REPEATS + 2)][2:]
                    figures[f"{name}_ms_{RUNS}"] = round(statistics.median(times), 1)
                    figures[f"{name}_worst_ms"] = round(max(times), 1)
            figures["queries"] = int(stage.run_python(QUERIES))
    print_report(figures)


if __name__ == "__main__":
    main()
