"""The jobs of one owner do not delay those of the others."""

import pytest

from training.jobs.models import Job
from training.jobs.runner import claim_next
from training.jobs.services import enqueue_job

pytestmark = pytest.mark.django_db


def test_owners_take_turns(kind, people):
    for number in range(3):
        enqueue_job(people["alice"], kind.name, f"alice {number}")
    enqueue_job(people["bob"], kind.name, "bob")
    enqueue_job(people["lea"], kind.name, "lea")
    kind.run_jobs()
    assert kind.handled_keys == ["alice 0", "bob", "lea", "alice 1", "alice 2"]


def test_an_owner_whose_job_runs_waits_for_owners_without_one(kind, people):
    enqueue_job(people["bob"], kind.name, "before")
    assert claim_next(kind.lane).key == "before"
    Job.objects.update(heartbeat_at=None)
    enqueue_job(people["bob"], kind.name, "bob")
    enqueue_job(people["alice"], kind.name, "alice")
    assert [claim_next(kind.lane).key for _ in range(2)] == ["alice", "bob"]
