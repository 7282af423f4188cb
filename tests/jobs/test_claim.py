"""A job is claimed by exactly one worker."""

import threading

import pytest
from django.db import connections

from training.jobs import runner
from training.jobs.models import Job
from training.jobs.runner import JobCancelled, claim_job, save_job
from training.jobs.services import enqueue_job


@pytest.mark.django_db(transaction=True)
def test_only_one_of_many_workers_claims_a_job(kind, alice):
    job = enqueue_job(alice, kind.name, "1")
    start, claims = threading.Barrier(6), []

    def claim():
        start.wait()
        claims.append(claim_job(job.pk, kind.lane))
        connections.close_all()

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in claims if one is not None]) == 1
    assert Job.objects.get().tries == 1


@pytest.mark.django_db
def test_a_worker_that_lost_its_job_cannot_write(kind, alice):
    job = enqueue_job(alice, kind.name, "1")
    first = claim_job(job.pk, kind.lane)
    Job.objects.update(state="waiting")
    second = claim_job(job.pk, kind.lane)
    with pytest.raises(JobCancelled):
        save_job(first, progress_message="too late")
    runner.fail_job(first, "too late")
    save_job(second, progress_message="mine")
    job.refresh_from_db()
    assert (job.state, job.progress_message, job.error) == ("running", "mine", "")


@pytest.mark.django_db
def test_a_job_of_one_key_runs_again_only_with_restart(kind, alice):
    first = enqueue_job(alice, kind.name, "1", params={"n": 1})
    assert enqueue_job(alice, kind.name, "1", params={"n": 2}) == first
    kind.handler = lambda job: {"n": job.params["n"]}
    kind.run_jobs()
    kind.run_jobs()
    assert enqueue_job(alice, kind.name, "1").result == {"n": 1}
    again = enqueue_job(alice, kind.name, "1", params={"n": 3}, restart=("done",))
    assert (again.pk, again.state, again.result) == (first.pk, "waiting", {})
    kind.run_jobs()
    again.refresh_from_db()
    assert (again.result, kind.handled_keys) == ({"n": 3}, ["1", "1"])


@pytest.mark.django_db
def test_an_exception_is_on_the_jobs_row_and_in_the_log(kind, alice, caplog):
    def raise_error(_job):
        raise OSError("the disk")

    kind.handler = raise_error
    enqueue_job(alice, kind.name, "1")
    kind.run_jobs()
    assert Job.objects.get().state == "failed"
    assert "OSError" in Job.objects.get().error
    assert "the disk" in caplog.text
