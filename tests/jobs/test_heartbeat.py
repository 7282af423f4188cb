"""A job that takes long sends heartbeats."""

import time
from datetime import timedelta

import pytest
from django.utils import timezone

from training.jobs import runner
from training.jobs.models import Job
from training.jobs.recovery import recover_lost_jobs
from training.jobs.services import enqueue_job


@pytest.mark.django_db(transaction=True)
def test_a_job_without_progress_messages_is_still_alive(kind, alice, monkeypatch):
    monkeypatch.setattr(runner, "HEARTBEAT_SECONDS", 0.05)
    old = timezone.now() - timedelta(hours=1)

    def take_long(job):
        Job.objects.filter(pk=job.pk).update(heartbeat_at=old)
        deadline = time.monotonic() + 20
        while Job.objects.get(pk=job.pk).heartbeat_at == old:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        recover_lost_jobs()
        return {"state": Job.objects.get(pk=job.pk).state}

    kind.handler = take_long
    enqueue_job(alice, kind.name, "1")
    kind.run_jobs()
    assert Job.objects.get().result == {"state": "running"}
