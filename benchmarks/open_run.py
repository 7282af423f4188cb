"""Measure how long it takes to open a run of a million steps, from the click in the list to the
frame with its curves, and how many of 100 one-step spikes the drawn curve has. The run is written
to the database in its compacted form, not trained.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report, quantile
from tests.browser.chromium import launch_browser
from tests.running_site import RunningSite

STEPS, SPIKES, HEIGHT, REPEATS = 1_000_000, 100, 50.0, 7

WRITE_RUN = """
import django, json, sys
django.setup()
from training.runs.worker import tasks
from training.runs.launch.request import LaunchRequest, launch_runs
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.people.models import User
from tests.runs.large_runs import write_long_run
tasks.supervise_task = lambda _id: None
from django.db import transaction
with transaction.atomic():
    model, data = BaseModel.objects.get(), DatasetVersion.objects.get()
    request = LaunchRequest(user=User.objects.get(), base_model=model, data=data, name="Long")
    run = launch_runs(request, accept_warnings=True)
    steps, spikes, height = map(json.loads, sys.argv[1:])
    write_long_run(run, steps=steps, spikes=spikes, height=float(height))
print(run.pk)
"""

# Count the spikes that have a point of the unsmoothed line within one bucket of their step.
COUNT_SPIKES = """([spikes, height]) => {
  const { x, y } = document.getElementById("chart").data[0];
  const width = Math.max(1, x.at(-1) / 500);
  const isVisible = (spike) => x.some((at, i) => Math.abs(at - spike) <= width && y[i] >= height);
  return spikes.filter(isVisible).length;
}"""


def main() -> None:
    from tests import tiny

    home = Path(tempfile.mkdtemp(prefix="snapml-bench-"))
    spikes = sorted(random.Random(7).sample(range(1, STEPS + 1), SPIKES))
    with RunningSite(home, tiny.make_model(home / "model")) as stage, launch_browser() as chromium:
        run = stage.run_python(WRITE_RUN, STEPS, spikes, HEIGHT).strip()
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.goto(stage.address + "/sign-in")
        page.fill("#username", "alice")
        page.fill("#password", "tulip-river-42")
        page.click("button:has-text('Sign in')")
        page.add_init_script(
            "document.addEventListener('drawn', () => { window.drawnAt ??= performance.timeOrigin "
            "+ performance.now(); })"
        )
        # The first request fills the browser's cache
        waits = [open_once(page, stage.address, run) for _ in range(REPEATS + 1)][1:]
        visible_spikes = page.evaluate(COUNT_SPIKES, [spikes, HEIGHT])
        server = [server_time(page, run) for _ in range(REPEATS)]
    print_report(
        {
            "open_p50_ms": round(quantile(waits, 0.5), 1),
            "open_max_ms": round(max(waits), 1),
            "curves_p50_ms": round(quantile(server, 0.5), 1),
            "steps": STEPS,
            "visible_spikes": visible_spikes,
            "spikes": SPIKES,
        }
    )


def open_once(page: Any, address: str, run: str) -> float:
    """Milliseconds from the click on the run's name to its drawn curves."""
    page.goto(address + "/")
    link = page.locator(f"a[href='/runs/{run}']")
    link.wait_for()
    page.evaluate("sessionStorage.clicked = ''")
    page.evaluate(
        "addEventListener('click', () => { sessionStorage.clicked = performance.timeOrigin + "
        "performance.now(); }, true)"
    )
    link.click()
    page.wait_for_url(f"**/runs/{run}")
    # wait_for_function would need a content security policy that allows eval
    while not page.evaluate("window.drawnAt ?? 0"):
        page.wait_for_timeout(20)
    return float(page.evaluate("window.drawnAt - Number(sessionStorage.clicked)"))


def server_time(page: Any, run: str) -> float:
    """Milliseconds for the curves alone, from the API."""
    script = (
        "async (u) => { const t = performance.now(); await (await fetch(u)).arrayBuffer(); "
        "return performance.now() - t; }"
    )
    return float(page.evaluate(script, f"/api/v1/runs/{run}/metrics?points=1000"))


if __name__ == "__main__":
    main()
