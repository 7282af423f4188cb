"""A job whose worker meets a full disk fails with that reason instead of the error's name."""

import errno

import pytest
from django.db import OperationalError

from tests.user_errors import assert_mentions
from training.jobs.models import Job, JobState
from training.jobs.services import enqueue_job


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OperationalError("database or disk is full"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    ],
)
def test_a_job_on_a_full_disk_says_so(kind, alice, error, fact):
    def fail(_job):
        raise error

    kind.handler = fail
    job = enqueue_job(alice, kind.name, "1")
    kind.run_jobs()
    job = Job.objects.get(pk=job.pk)
    assert job.state == JobState.FAILED
    assert_mentions(job.error, fact)
