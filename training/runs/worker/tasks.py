"""Huey's doors: thin, and handed nothing but an id."""

from __future__ import annotations

import logging
from typing import Any

from huey.contrib.djhuey import db_task

from training.sqlite_queue import QUEUE_ERRORS

log = logging.getLogger("snapml.runs")


@db_task()
def supervise_task(run_id: int) -> None:
    from training.runs.worker.supervisor import supervise_run

    supervise_run(run_id)


def enqueue_supervision(run_id: int, **_signal: Any) -> None:
    """Ask a worker to look at this run. The sweeper would find it too, within 2 s."""
    try:
        supervise_task(run_id)
    except QUEUE_ERRORS as error:  # that must not undo a launch; the sweeper comes by
        log.warning("The queue did not take run %s (%s); the sweeper will find it.", run_id, error)
