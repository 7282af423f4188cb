"""Lanes limit their own jobs and do not wait for each other."""

import threading

import pytest
from django.db import connections

from adapters.lanes import ANSWERS, PROGRAMS
from training.jobs.kinds import KINDS
from training.jobs.models import Job
from training.jobs.runner import claim_job, run_job
from training.jobs.services import enqueue_job


def run_in_thread(job_id):
    def run_and_close():
        run_job(job_id)
        connections.close_all()

    thread = threading.Thread(target=run_and_close)
    thread.start()
    return thread


@pytest.mark.django_db(transaction=True)
def test_a_job_in_one_lane_does_not_wait_for_one_in_another(make_kind, alice):
    slow, quick = make_kind("slow"), make_kind("quick")
    is_begun, may_end = threading.Event(), threading.Event()
    slow.handler = lambda _job: (is_begun.set(), may_end.wait(30), {})[-1]
    thread = run_in_thread(enqueue_job(alice, slow.name, "1").pk)
    assert is_begun.wait(30)
    try:
        second = enqueue_job(alice, slow.name, "2")
        run_job(second.pk)  # returns at once: the lane is full
        run_job(enqueue_job(alice, quick.name, "1").pk)
        assert (quick.handled_keys, slow.handled_keys) == (["1"], ["1"])
    finally:
        may_end.set()
        thread.join()
    assert slow.handled_keys == ["1", "2"]  # the thread of the first job continues with the next
    assert set(Job.objects.values_list("state", flat=True)) == {"done"}


@pytest.mark.django_db
def test_the_oldest_goes_first(kind, alice):
    for key in ("b", "a", "c"):
        enqueue_job(alice, kind.name, key)
    kind.run_jobs()
    assert kind.handled_keys == ["b", "a", "c"]


@pytest.mark.django_db
def test_one_job_per_owner_at_a_time(make_kind, people):
    kind = make_kind("fair", size=2, one_per_owner=True)
    first, second, other = (
        enqueue_job(people[name], kind.name, key)
        for name, key in (("alice", "1"), ("alice", "2"), ("bob", "3"))
    )
    assert claim_job(first.pk, kind.lane) is not None
    assert claim_job(second.pk, kind.lane) is None
    assert claim_job(other.pk, kind.lane) is not None


def test_answers_do_not_wait_behind_a_merge():
    assert KINDS["answers"].lane is ANSWERS
    assert {KINDS[name].lane for name in ("merge", "gguf", "push", "weight_analysis")} == {PROGRAMS}
    assert ANSWERS is not PROGRAMS


def test_two_uploads_are_read_at_a_time_one_per_user():
    assert (KINDS["upload"].lane.size, KINDS["upload"].one_per_owner) == (2, True)
