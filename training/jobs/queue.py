"""The message queue that wakes workers up. A message contains only a job's id."""

from __future__ import annotations

import logging
from functools import partial

from django.conf import settings
from django.db import transaction
from huey.contrib.djhuey import close_db

from training.jobs.runner import run_job
from training.sqlite_queue import QUEUE_ERRORS

log = logging.getLogger("snapml.jobs")


@settings.JOBS_HUEY.task(name="run_job")
@close_db
def run_queued_job(job_id: int) -> None:
    run_job(job_id)


def wake_worker(job_id: int) -> None:
    try:
        run_queued_job(job_id)
    except QUEUE_ERRORS as error:  # not fatal: recovery.py finds the row
        log.warning(
            "Job %s could not be queued (%s). It will be found by the periodic check.",
            job_id,
            error,
        )


def wake_worker_on_commit(job_id: int) -> None:
    transaction.on_commit(partial(wake_worker, job_id))
