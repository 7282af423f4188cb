"""Lost queue messages: the periodic check finds waiting jobs by their rows."""

import pytest
from django.conf import settings

from training.jobs import queue
from training.jobs.models import Job
from training.jobs.recovery import RECOVERY_SECONDS, recover_and_wake_jobs
from training.jobs.runner import claim_job
from training.jobs.services import enqueue_job


@pytest.fixture
def woken_ids(monkeypatch):
    ids = []
    monkeypatch.setattr(queue, "run_queued_job", ids.append)
    return ids


@pytest.mark.django_db
def test_a_worker_is_woken_once_the_job_is_committed(
    kind, alice, woken_ids, django_capture_on_commit_callbacks
):
    with django_capture_on_commit_callbacks(execute=True):
        job = enqueue_job(alice, kind.name, "1")
        assert woken_ids == []
    assert woken_ids == [job.pk]


@pytest.mark.django_db
def test_a_failing_queue_keeps_the_job_and_recovery_wakes_a_worker(
    kind, alice, monkeypatch, django_capture_on_commit_callbacks
):
    def is_down(_job_id):
        raise OSError("no disk")

    monkeypatch.setattr(queue, "run_queued_job", is_down)
    with django_capture_on_commit_callbacks(execute=True):
        job = enqueue_job(alice, kind.name, "1")
    ids = []
    monkeypatch.setattr(queue, "run_queued_job", ids.append)
    recover_and_wake_jobs()
    assert ids == [job.pk]
    assert RECOVERY_SECONDS <= 1


@pytest.mark.django_db
def test_recovery_wakes_at_most_as_many_workers_as_there_are_free_slots(kind, alice, woken_ids):
    jobs = [enqueue_job(alice, kind.name, str(number)) for number in range(3)]
    recover_and_wake_jobs()
    assert woken_ids == [jobs[0].pk]
    assert kind.lane.acquire_slot()
    recover_and_wake_jobs()
    assert len(woken_ids) == 1


@pytest.mark.django_db
def test_recovery_without_open_jobs_is_one_query(kind, django_assert_num_queries):
    with django_assert_num_queries(1):
        recover_and_wake_jobs()


@pytest.mark.django_db
def test_a_message_for_a_done_or_deleted_job_does_nothing(kind, alice):
    job = enqueue_job(alice, kind.name, "1")
    kind.run_jobs()
    queue.run_job(job.pk)
    Job.objects.all().delete()
    queue.run_job(job.pk)
    assert kind.handled_keys == ["1"]


@pytest.mark.django_db
def test_a_message_for_a_running_job_does_nothing(kind, alice):
    job = enqueue_job(alice, kind.name, "1")
    claim_job(job.pk, kind.lane)
    queue.run_job(job.pk)
    assert kind.handled_keys == []


def test_jobs_and_runs_have_separate_queues():
    assert settings.JOBS_HUEY.name != settings.HUEY.name
