"""The worker program's own threads beside Huey's: the sweeper, and a shutdown that lets engines save first."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from django.conf import settings
from django.db import close_old_connections
from huey.consumer import Consumer

from training.catalog import acts as catalog
from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Upload, UploadState
from training.datasets.uploads import sweep_temporary, work_on_upload
from training.datasets.work import forget_dead_work
from training.people.webhooks import send_due
from training.runs import supervise, tasks
from training.runs.lease import claimable_runs

SWEEP_SECONDS = 2.0
log = logging.getLogger("snapml.worker")


class Worker(Consumer):  # type: ignore[misc]
    """Huey's consumer; SIGTERM and SIGINT both end it in order: engines save, watchers let go, then threads stop."""

    def _set_signal_handlers(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        supervise.shutting_down.set()
        self._handle_signal(self._graceful_sig, None)


def run_worker(huey: Any) -> None:
    """Serve until told to end. One thread for each slot, one for imports and one for uploads."""
    catalog.forget_dead_imports()
    forget_dead_work()
    sweep_temporary()
    if settings.BUILTIN_MODEL:
        catalog.add_builtin()
    threading.Thread(target=sweep_for_ever, name="sweeper", daemon=True).start()
    worker = Worker(huey, workers=settings.SLOTS + 2, periodic=False, initial_delay=0.05, max_delay=0.5)
    worker.run()


def sweep_for_ever() -> None:
    """Ring for whatever waits without a watcher: lost doorbells, dead workers' runs, paused runs, models to import."""
    while not supervise.shutting_down.wait(SWEEP_SECONDS):
        close_old_connections()
        try:
            sweep()
        except Exception:
            log.exception("The sweeper failed and tries again in %s s.", SWEEP_SECONDS)


def sweep() -> None:
    if settings.HUEY.pending_count():
        return  # bells that were rung are not answered yet; more of them would only pile up
    for run_id in claimable_runs():
        tasks.supervise(run_id)
    for model_id in BaseModel.objects.filter(state=ModelState.WAITING).values_list("pk", flat=True):
        tasks.import_model(model_id)
    send_due()
    for upload_id in Upload.objects.filter(state=UploadState.WAITING).values_list("pk", flat=True):
        work_on_upload(upload_id)
