"""Measure the delay from a step event of the engine to its point in the browser, with SQLite, one
tab and 10 points per second.

A script replaces the engine and writes step events with timestamps to the journal of a real run.
The real worker, database, web server, WebSocket and page carry them to a headless Chromium, which
records the time of the frame in which a point was drawn. Both clocks are the machine's.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report, quantile
from tests.browser.chromium import launch_browser
from tests.running_site import RunningSite

POINTS, RATE, WARMUP_POINTS = 300, 10.0, 20

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
begin = time.time() + 6
for n in range(1, points + 1):
    time.sleep(max(0, begin + n / rate - time.time()))
    journal.write_event(
        "step", step=n, loss=3 / n + 0.5, learning_rate=1e-3, gradient_norm=1.0, tokens=512,
        trained_tokens=100, total_tokens=512 * n, tokens_per_second=5000.0, seconds=1 / rate,
        memory_bytes=10**9, memory_peak_bytes=2 * 10**9)
time.sleep(3)
"""


def main() -> None:
    import subprocess

    from tests import tiny

    home = Path(tempfile.mkdtemp(prefix="snapml-bench-"))
    model = tiny.make_model(home / "model")
    with RunningSite(home, model) as stage, launch_browser() as chromium:
        run = stage.run_python(LAUNCH).strip()
        folder = home / "runs" / run
        writer = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(folder), str(POINTS), str(RATE)],
            env=stage.env,
            cwd=Path.cwd(),
        )
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.goto(stage.address + "/sign-in")
        page.fill("#username", "alice")
        page.fill("#password", "tulip-river-42")
        page.click("button:has-text('Sign in')")
        page.goto(f"{stage.address}/runs/{run}")
        page.evaluate(
            "window.drawn = []; document.addEventListener('drawn', (e) => "
            "window.drawn.push([e.detail.seq, performance.timeOrigin + performance.now()]))"
        )
        writer.wait()
        drawn: list[list[float]] = page.evaluate("window.drawn")
    events = tiny.read_events(folder)
    print_report(summarize_waits(events, drawn))


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
