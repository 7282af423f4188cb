"""A worker thread that supervises a run during a test."""

import threading
import time

from django.db import connections

from training.runs.worker.supervisor import supervise_run


def start_supervisor(run):
    """A thread that ends when the supervisor returns."""

    def run_supervisor():
        try:
            supervise_run(run.pk)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run_supervisor)
    thread.start()
    return thread


def wait_until(is_ready, seconds=120):  # an engine imports for 10 s on a quiet machine
    end = time.monotonic() + seconds
    while not is_ready():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def add_checkpoint(run):
    """A complete checkpoint, as far as pages and supervisors look into it."""
    folder = run.folder / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
