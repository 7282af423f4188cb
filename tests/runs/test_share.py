"""Two runs on one device: each is held to what it reserved, and one that takes more leaves with a checkpoint and reserves more."""

import os
import threading

import pytest

from tests.runs.test_supervise import in_thread, launched, wait_for  # noqa: F401
from training.gpus import reserve
from training.gpus.models import Allocation, Device, Pool
from training.runs import supervise
from training.runs.lease import claim
from training.runs.models import Run
from training.runs.share import LOOKS, Share
from training.runs.states import State

GB = 10**9


@pytest.fixture
def shared(run):
    """The run holds the device with 1 MB reserved, and may share it."""
    Pool.objects.update(runs_per_device=2)
    Run.objects.filter(pk=run.pk).update(forecast={"peak": 10**6})
    assert claim(run.pk)
    return run


def beside(run, pk=10**6):
    """Another run holds a place on the same device."""
    reserve.reserve(Device.objects.get(), reserve.Holder(pk, "other", run.owner, run.team, "normal", GB))


def looks(share, times=LOOKS):
    return [share.exceeded(os.getpid()) for _ in range(times)]


def test_it_works(shared):
    beside(shared)
    seen = looks(Share(shared.pk))
    assert seen[:-1] == [0] * (LOOKS - 1), "one look may meet a moment"
    assert seen[-1] > 10**7, "what this process takes"


def test_alone_on_a_device_it_may_take_what_is_there(shared):
    assert looks(Share(shared.pk)) == [0] * LOOKS


def test_within_its_reservation_it_is_left_alone(shared):
    beside(shared)
    Allocation.objects.filter(run_id=shared.pk).update(reserved_bytes=10**12)
    assert looks(Share(shared.pk)) == [0] * LOOKS


def test_where_devices_are_not_shared_nothing_is_watched(shared):
    beside(shared)
    Pool.objects.update(runs_per_device=1)
    assert looks(Share(shared.pk)) == [0] * LOOKS


def test_of_a_card_it_counts_what_the_driver_told_of_its_processes(shared):
    beside(shared)
    Pool.objects.update(kind="H100")
    Device.objects.update(processes=[{"pid": os.getpid(), "bytes": 3 * GB}, {"pid": 1, "bytes": 50 * GB}])
    assert looks(Share(shared.pk))[-1] == 3 * GB
    assert Share(shared.pk).variables()["SNAPML_DEVICE_BYTES"] == str(10**6)


def test_a_run_that_takes_too_much_leaves_with_a_checkpoint_and_reserves_more(launched, alice, monkeypatch):  # noqa: F811
    monkeypatch.setattr(supervise, "SHARE_SECONDS", 0.05)
    Pool.objects.update(runs_per_device=2)
    run = launched(max_steps=100_000, save_interval=100_000, eval_interval=100_000)
    Run.objects.filter(pk=run.pk).update(forecast={"peak": 10**6})
    watcher = threading.Thread(target=in_thread, args=(run.pk,))
    watcher.start()
    wait_for(lambda: Run.objects.get(pk=run.pk).step > 0)
    beside(run)
    watcher.join(60)
    run.refresh_from_db()
    assert "of a device that others use, and had reserved 0.0 GB; no step is lost" in run.message
    assert run.state == State.QUEUED and run.forecast["peak"] > 10**8
    assert any((run.folder / "checkpoints").iterdir())
