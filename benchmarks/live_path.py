"""Measure the delay from a step event of the engine to its point in the browser, with SQLite and 10
points per second, for one tab, or with `--sockets 500` for one tab among 500 sockets on the run.

A script replaces the engine and writes step events with timestamps to the journal of a real run.
The real worker, database, web server, WebSocket and page carry them to a headless Chromium, which
records the time of the frame in which a point was drawn. Both clocks are the machine's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from benchmarks import print_report, quantile
from tests.browser.chromium import launch_browser
from tests.running_site import RunningSite

POINTS, RATE, WARMUP_POINTS = 300, 10.0, 20
SOCKETS_PER_USER = 20  # the limit of a user

LAUNCH = """
import django, json
django.setup()
from django.db.models import F
from training.runs.launch.request import LaunchRequest, launch_runs
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.people.models import User
from training.runs.worker import engine_process, tasks
tasks.supervise_task = lambda _id: None
model, data = BaseModel.objects.get(), DatasetVersion.objects.get()
request = LaunchRequest(user=User.objects.get(), base_model=model, data=data, name="Bench")
run = launch_runs(request, accept_warnings=True)
print(run.pk)
"""

# The script that replaces the engine. It holds the engine's lock, so the worker treats it as a
# running engine.
ENGINE = """
import fcntl, json, os, sys, time
from pathlib import Path
from training.engine.events import Journal
folder, points, rate = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
lock = (folder / "engine.lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
(folder / "engine.json").write_text(json.dumps({"pid": os.getpid()}))
journal = Journal(folder)
journal.write_event(
    "start", attempt=1, step=0, total_steps=points, epochs=1, rows=1, eval_rows=1, tokens=1,
    trained_tokens=1, truncated_rows=0, empty_rows=0, trainable_parameters=1, parameters=1,
    device="CPU", precision="fp32", threads=1, chat_template="model", versions={})
while not (folder / "go").exists():
    time.sleep(0.05)
begin = time.time() + 1
for n in range(1, points + 1):
    time.sleep(max(0, begin + n / rate - time.time()))
    journal.write_event(
        "step", step=n, loss=3 / n + 0.5, learning_rate=1e-3, gradient_norm=1.0, tokens=512,
        trained_tokens=100, total_tokens=512 * n, tokens_per_second=5000.0, seconds=1 / rate,
        memory_bytes=10**9, memory_peak_bytes=2 * 10**9)
time.sleep(3)
"""

SESSIONS = """
import django, json, sys
django.setup()
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from training.people.models import User
keys = []
for number in range(int(sys.argv[1])):
    user = User.objects.create_superuser(f"viewer-{number}", password="tulip-river-42")
    session = SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    keys.append(session.session_key)
print(json.dumps(keys))
"""

FOLLOW = """
import json, sys
from benchmarks.web_sockets import follow_run
sessions = json.loads(sys.argv[2])
print(json.dumps(follow_run(int(sys.argv[1]), sessions, int(sys.argv[3]), int(sys.argv[4]))))
"""


def main() -> None:
    from tests import tiny

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sockets", type=int, default=0, help="besides the browser tab")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="snapml-bench-"))
    model = tiny.make_model(home / "model")
    with RunningSite(home, model) as site, launch_browser() as chromium:
        run = site.run_python(LAUNCH).strip()
        folder = home / "runs" / run
        writer = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(folder), str(POINTS), str(RATE)],
            env=site.env,
            cwd=Path.cwd(),
        )
        followers = start_followers(site, run, options.sockets)
        web_cpu = psutil.Process(site.find_pid("web")).cpu_times
        cpu_before, started_at = sum(web_cpu()[:2]), time.monotonic()
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.goto(site.address + "/sign-in")
        page.fill("#username", "alice")
        page.fill("#password", "tulip-river-42")
        page.click("button:has-text('Sign in')")
        page.goto(f"{site.address}/runs/{run}")
        page.evaluate(
            "window.drawn = []; document.addEventListener('drawn', (e) => "
            "window.drawn.push([e.detail.seq, performance.timeOrigin + performance.now()]))"
        )
        (folder / "go").touch()  # everybody is connected
        writer.wait()
        drawn: list[list[float]] = page.evaluate("window.drawn")
        web_share = (sum(web_cpu()[:2]) - cpu_before) / (time.monotonic() - started_at)
        figures = {"web_cpu": web_share}
        if followers is not None:
            output, _ = followers.communicate(timeout=60)
            assert followers.returncode == 0, "a socket lost a frame"
            figures |= json.loads(output)
    events = tiny.read_events(folder)
    print_report(summarize_waits(events, drawn) | figures)


def start_followers(site: RunningSite, run: str, sockets: int) -> subprocess.Popen[str] | None:
    """Start a process with `sockets` sockets that follow the run to its end, and wait until all are
    open.
    """
    if not sockets:
        return None
    users = -(-sockets // SOCKETS_PER_USER)
    keys = json.loads(site.run_python(SESSIONS, users))
    sessions = json.dumps((keys * SOCKETS_PER_USER)[:sockets])
    command = [sys.executable, "-c", FOLLOW, str(site.port), sessions, run, str(POINTS + 1)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "a socket was refused"
    return process


def summarize_waits(events: list[dict[str, Any]], drawn: list[list[float]]) -> dict[str, Any]:
    """Milliseconds from the event of each step to the end of the first frame with its point. The
    first steps are warm-up.
    """
    steps = [event for event in events if event["kind"] == "step"][WARMUP_POINTS:]
    waits = []
    for event in steps:
        drawn_at = next((at for seq, at in drawn if seq >= event["seq"]), None)
        if drawn_at is not None:
            waits.append(drawn_at - 1000 * event["time"])
    return {
        "p50_ms": round(quantile(waits, 0.5), 1),
        "p95_ms": round(quantile(waits, 0.95), 1),
        "max_ms": round(max(waits), 1),
        "points": len(waits),
        "never_drawn": len(steps) - len(waits),
        "measured_at": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
