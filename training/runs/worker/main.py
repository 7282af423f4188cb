"""The worker program's own threads beside Huey's: the sweeper, and a shutdown that lets engines
save first.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from django.conf import settings
from django.db import close_old_connections
from huey.consumer import Consumer

from training.catalog import acts as catalog
from training.catalog.models import BaseModel, ModelState
from training.datasets.uploads import sweep_temporary
from training.datasets.work import AT_ONCE, read_next
from training.gpus import devices
from training.gpus.models import MOST_A_DEVICE
from training.people.webhooks import send_due
from training.runs.launch.method_costs import forecast_launched, make_beforehand
from training.runs.queue import reasons
from training.runs.worker import supervisor, tasks
from training.runs.worker.lease import claimable_runs

log = logging.getLogger("snapml.worker")


class Worker(Consumer):  # type: ignore[misc]
    """Huey's consumer; SIGTERM and SIGINT both end it in order: engines save, watchers let go, then
    threads stop.
    """

    def _set_signal_handlers(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        supervisor.shutting_down.set()
        self._handle_signal(self._graceful_sig, None)


def run_worker(huey: Any) -> None:
    """Serve until told to end. A thread for each run that may train here, one for imports, and some
    beside (BESIDE).
    """
    catalog.forget_dead_imports()
    if settings.BUILTIN_MODEL:
        catalog.add_builtin()
    for act, seconds, threads in BESIDE:
        for _ in range(threads):
            threading.Thread(
                target=repeat, args=(act, seconds), name=act.__name__, daemon=True
            ).start()
    devices.report()
    threads = MOST_A_DEVICE * len(devices.read_devices())  # each watches one run
    worker = Worker(huey, workers=threads + 1, periodic=False, initial_delay=0.05, max_delay=0.5)
    worker.run()


def repeat(act: Callable[[], object], seconds: float) -> None:
    """Do something over and over until the worker ends; what fails once is tried again."""
    while not supervisor.shutting_down.wait(seconds):
        close_old_connections()
        try:
            act()
        except Exception:
            log.exception("%s failed and is tried again in %s s.", act.__name__, seconds)


def sweep() -> None:
    reasons.look()
    if settings.HUEY.pending_count():
        return  # bells that were rung are not answered yet; more of them would only pile up
    for run_id in claimable_runs():
        tasks.supervise(run_id)
    for model_id in BaseModel.objects.filter(state=ModelState.WAITING).values_list("pk", flat=True):
        tasks.import_model(model_id)


# What a worker does beside supervising runs: act, seconds between two times, threads.
# `adapters` adds its own (adapters/apps.py).
BESIDE: list[tuple[Callable[[], object], float, int]] = [
    (devices.report, 5.0, 1),
    (sweep, 2.0, 1),
    (read_next, 0.3, AT_ONCE),
    (send_due, 1.0, 1),
    (make_beforehand, 5.0, 1),
    (forecast_launched, 3.0, 1),
    (sweep_temporary, 3600.0, 1),
]
