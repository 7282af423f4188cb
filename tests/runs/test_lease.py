import subprocess
import sys
from datetime import timedelta

import pytest
from django.db.models.functions import Now
from django.utils import timezone

from training.gpus.models import Pool
from training.process_identity import (
    get_host_name,
    get_process_name,
    get_process_start_time,
    is_alive,
)
from training.runs.models import Run
from training.runs.states import State
from training.runs.worker.lease import Lease, LeaseLost, claim_run, list_claimable_runs

pytestmark = pytest.mark.django_db


def make_dead_owner():
    """The name of a worker process of this host that has exited."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{get_host_name()}:{child.pid}:{get_process_start_time(child.pid)}"
    assert is_alive(name)
    child.kill()
    child.wait()
    return name


def test_only_the_first_claim_gets_the_run(run):
    assert claim_run(run.pk) is not None
    assert claim_run(run.pk) is None
    assert Run.objects.get(pk=run.pk).state == State.STARTING


def test_an_empty_token_is_no_lease(run):
    with pytest.raises(LeaseLost):
        Lease(run.pk, "").update_run(message="written without a lease")
    assert Run.objects.get(pk=run.pk).message == ""


def test_a_device_has_at_most_as_many_runs_as_its_pool_allows(run):
    other = Run.objects.get(pk=run.pk)
    other.pk = None
    other.save()
    Run.objects.update(forecast={"peak": 8 * 10**9})
    assert claim_run(run.pk)
    assert claim_run(other.pk) is None
    assert list_claimable_runs() == []
    Pool.objects.update(runs_per_device=2)
    assert claim_run(other.pk)


def test_a_run_is_not_claimed_before_its_retry_time(run):
    Run.objects.filter(pk=run.pk).update(not_before=timezone.now() + timedelta(minutes=1))
    assert list_claimable_runs() == []
    assert claim_run(run.pk) is None


def test_a_run_of_a_dead_worker_is_claimed_at_once_with_a_new_token(run):
    first = claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING, lease_owner=make_dead_owner())
    assert list_claimable_runs() == [run.pk]
    second = claim_run(run.pk)
    assert second.token != first.token
    with pytest.raises(LeaseLost):
        first.renew()
    second.renew()


def test_a_run_is_claimed_again_only_after_its_lease_expires(run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    assert claim_run(run.pk) is None
    Run.objects.filter(pk=run.pk).update(
        lease_owner="elsewhere:1:1", lease_expires_at=Now() - timedelta(seconds=1)
    )
    assert claim_run(run.pk) is not None


def test_a_process_is_identified_by_its_start_time_too():
    assert is_alive(get_process_name())
    assert not is_alive(get_process_name() + "1")


def test_a_stale_token_writes_nothing(run):
    lease = claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(lease_token="another")
    with pytest.raises(LeaseLost):
        lease.update_run(message="mine")
    assert Run.objects.get(pk=run.pk).message == ""
