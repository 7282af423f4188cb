"""The queue of jobs: a wake-up for workers. A message holds a job's id and nothing else."""

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
    except QUEUE_ERRORS as error:  # the row is there, and the sweeper looks at rows
        log.warning("The queue did not take job %s (%s); the sweeper will.", job_id, error)


def wake_worker_on_commit(job_id: int) -> None:
    transaction.on_commit(partial(wake_worker, job_id))
