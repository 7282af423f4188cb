"""A job whose worker has died is started again, and fails after too many tries."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from django.utils import timezone

from training.jobs.models import Job
from training.jobs.recovery import recover_lost_jobs, release_own_jobs
from training.jobs.runner import claim_job
from training.jobs.services import enqueue_job
from training.process_identity import get_host_name, get_process_start_time

pytestmark = pytest.mark.django_db


@pytest.fixture
def claimed_job(kind, alice):
    return claim_job(enqueue_job(alice, kind.name, "1").pk, kind.lane)


def job_state():
    return Job.objects.get().state


def test_a_job_is_lost_after_half_a_minute_without_a_heartbeat(claimed_job, kind):
    Job.objects.update(worker="elsewhere:1:1", heartbeat_at=timezone.now() - timedelta(seconds=25))
    recover_lost_jobs()
    assert job_state() == "running"
    Job.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=30))
    recover_lost_jobs()
    assert job_state() == "waiting"
    kind.run_jobs()
    assert (job_state(), Job.objects.get().tries) == ("done", 2)


def test_a_job_of_a_dead_process_on_this_host_is_lost_at_once(claimed_job):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        name = f"{get_host_name()}:{other.pid}:{get_process_start_time(other.pid)}"
        Job.objects.update(worker=name)
        recover_lost_jobs()
        assert job_state() == "running"
    recover_lost_jobs()
    assert job_state() == "waiting"


def test_a_later_process_with_the_same_pid_is_another_worker(claimed_job):
    Job.objects.update(worker=f"{get_host_name()}:{os.getpid()}:0")
    recover_lost_jobs()
    assert job_state() == "waiting"


def test_a_job_fails_after_three_tries(claimed_job, kind, alice):
    old = timezone.now() - timedelta(hours=1)
    Job.objects.update(tries=3, heartbeat_at=old)
    recover_lost_jobs()
    job = Job.objects.get()
    assert (job.state, "3 times" in job.error) == ("failed", True)
    enqueue_job(alice, kind.name, "1")  # a user may always try again
    kind.run_jobs()
    assert (job_state(), Job.objects.get().tries) == ("done", 1)


def test_a_kind_without_max_tries_is_always_started_again(make_kind, alice):
    endless = make_kind("endless", max_tries=None)
    claim_job(enqueue_job(alice, endless.name, "1").pk, endless.lane)
    Job.objects.update(tries=30, heartbeat_at=timezone.now() - timedelta(hours=1))
    recover_lost_jobs()
    assert job_state() == "waiting"


def test_a_worker_that_shuts_down_releases_its_jobs_without_counting_a_try(claimed_job):
    release_own_jobs()
    assert (job_state(), Job.objects.get().tries) == ("waiting", 0)
