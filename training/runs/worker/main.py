"""The worker program: Huey's consumer, periodic tasks, and a shutdown that lets engines save a
checkpoint first.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from django.conf import settings
from django.db import connections

from training.catalog import services as catalog
from training.datasets.upload_handler import remove_stale_uploads
from training.gpus import devices
from training.gpus.models import MAX_RUNS_PER_DEVICE
from training.jobs import runner as jobs
from training.jobs.consumer import JobConsumer, QueueConsumer
from training.jobs.recovery import RECOVERY_SECONDS, recover_and_wake_jobs, release_own_jobs
from training.people.disk_quota import update_all_disk_bytes
from training.runs.launch.method_costs import compute_missing_forecasts, precompute_estimator
from training.runs.queue import admission, queue_info
from training.runs.worker import supervisor, tasks
from training.runs.worker.lease import list_claimable_runs

log = logging.getLogger("snapml.worker")


class Worker(QueueConsumer):
    """Huey's consumer. SIGTERM and SIGINT both shut it down gracefully: engines save, supervisors
    return, then the threads stop.
    """

    def _set_signal_handlers(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._shut_down)

    def _shut_down(self, signal_number: int, _frame: FrameType | None) -> None:
        supervisor.shutting_down.set()
        jobs.stopping.set()
        self._handle_signal(self._graceful_sig, None)


def run_worker(huey: Any) -> None:
    """Run until shutdown. There is one thread for each run that may train on this host, one for
    each concurrent job, and one for each of PERIODIC_TASKS.
    """
    if settings.BUILTIN_MODEL:
        catalog.add_builtin_model()
    job_consumer = JobConsumer(settings.JOBS_HUEY)
    job_consumer.start()
    for task, seconds in [
        *PERIODIC_TASKS,
        (job_consumer.check_worker_health, HEALTH_CHECK_SECONDS),
    ]:
        threading.Thread(
            target=run_periodically, args=(task, seconds), name=task.__name__, daemon=True
        ).start()
    devices.update_devices()
    # Each thread supervises one run.
    worker = Worker(huey, threads=MAX_RUNS_PER_DEVICE * len(devices.read_devices()))
    worker.run()
    job_consumer.stop()
    release_own_jobs()


def run_periodically(task: Callable[[], object], seconds: float) -> None:
    """Call a task at this interval until shutdown, even after it has raised an exception."""
    while not supervisor.shutting_down.wait(seconds):
        try:
            task()
        except Exception:
            connections.close_all()  # of this thread, in case a connection caused the error
            log.exception("%s failed. Trying again in %s s.", task.__name__, seconds)


def enqueue_claimable_runs() -> None:
    """Update the queue, and enqueue a message for every run that this host can claim."""
    if not admission.has_open_runs():
        return  # a pass takes 15 ms
    queue_info.refresh_queue()
    if settings.HUEY.pending_count():
        return  # earlier messages are still in the queue; more would only pile up
    for run_id in list_claimable_runs():
        tasks.supervise_task(run_id)


HEALTH_CHECK_SECONDS = 10.0
# What a worker does besides supervising runs and running jobs: the task and its interval in
# seconds. `adapters` adds tasks (adapters/apps.py).
PERIODIC_TASKS: list[tuple[Callable[[], object], float]] = [
    (devices.update_devices, 5.0),
    (enqueue_claimable_runs, 2.0),
    (recover_and_wake_jobs, RECOVERY_SECONDS),
    (precompute_estimator, 5.0),
    (compute_missing_forecasts, 3.0),
    (remove_stale_uploads, 3600.0),
    (update_all_disk_bytes, 600.0),
]
