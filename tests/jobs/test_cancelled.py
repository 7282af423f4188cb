"""A job is cancelled when the row that it is about is deleted."""

import pytest
from django.conf import settings

from training.jobs.models import Job
from training.jobs.runner import claim_job, get_subject, save_progress
from training.jobs.services import enqueue_job, find_jobs_about, list_job_folders
from training.webhooks.models import Webhook

pytestmark = pytest.mark.django_db


@pytest.fixture
def hook(alice):
    return Webhook.objects.create(user=alice, url="https://example.com/x", secret="s")


def test_a_job_is_deleted_with_its_subject(kind, alice, hook):
    enqueue_job(alice, kind.name, "1", subjects=[hook])
    enqueue_job(alice, kind.name, "2")
    Webhook.objects.filter(pk=hook.pk).delete()
    assert [job.key for job in Job.objects.all()] == ["2"]


def test_a_running_job_stops_when_its_subject_is_deleted(kind, alice, hook):
    steps = []

    def delete_hook(job):
        steps.append("before")
        hook.delete()
        save_progress(job, {"message": "continuing"})
        steps.append("after")
        return {}

    kind.handler = delete_hook
    enqueue_job(alice, kind.name, "1", subjects=[hook])
    kind.run_jobs()
    assert (steps, Job.objects.count()) == (["before"], 0)


def test_jobs_and_their_subjects_are_linked(kind, alice, hook):
    job = enqueue_job(alice, kind.name, "1", subjects=[hook])
    other = Webhook.objects.create(user=alice, url="https://example.com/y", secret="s")
    enqueue_job(alice, kind.name, "2", subjects=[other])
    assert list(find_jobs_about(hook)) == [job]
    assert get_subject(claim_job(job.pk, kind.lane), Webhook) == hook


def test_job_folders_include_the_output_folders_of_the_kind(make_kind, alice, tmp_path):
    kind = make_kind("leaving", output_folders=lambda _job: [tmp_path])
    job = enqueue_job(alice, kind.name, "1")
    assert list_job_folders(job) == [settings.HOME / "jobs" / str(job.pk), tmp_path]
