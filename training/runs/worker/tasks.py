"""Huey tasks of runs. They take only an id."""

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
    """Ask a worker to check this run. Otherwise the periodic task finds the run within 2 s."""
    try:
        supervise_task(run_id)
    except QUEUE_ERRORS as error:  # a broken queue must not undo a launch
        log.warning("Run %s was not enqueued (%s). The periodic task will find it.", run_id, error)
