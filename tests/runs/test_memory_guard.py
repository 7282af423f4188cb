"""Runs on a shared device stay within their reservations; one that exceeds it saves a checkpoint
and reserves more.
"""

import os
import time

import pytest
from django.utils import timezone

from tests.runs.fake_engine import FakeEngine
from tests.runs.supervision import start_supervisor, wait_until
from tests.user_errors import assert_mentions
from training.gpus import allocations
from training.gpus.models import Allocation, Device, Host, Pool, Quota
from training.runs.forecast.memory import CONTEXT_BYTES, get_fixed_overhead
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Event, Run
from training.runs.states import State
from training.runs.worker import supervisor
from training.runs.worker.lease import Lease, claim_run
from training.runs.worker.memory_guard import (
    MIN_SAMPLES,
    MemoryGuard,
    measure_context,
    raise_forecast,
)
from training.runs.worker.supervisor import RunSupervisor

GB = 10**9


@pytest.fixture
def shared(run):
    """A run that has reserved 1 MB of a device that others may share."""
    Pool.objects.update(runs_per_device=2)
    Run.objects.filter(pk=run.pk).update(forecast={"peak": 10**6})
    assert claim_run(run.pk)
    return run


def reserve_other_run(run, pk=10**6):
    """Another run reserves a slot of the same device."""
    allocations.reserve_device(
        Device.objects.get(),
        allocations.AllocationRequest(pk, "other", run.owner, run.team, "normal", GB),
    )


def sample_memory(guard, times=MIN_SAMPLES):
    return [guard.get_over_limit_bytes(os.getpid()) for _ in range(times)]


def test_memory_over_the_limit_is_reported_after_several_samples(shared):
    reserve_other_run(shared)
    samples = sample_memory(MemoryGuard(shared.pk))
    assert samples[:-1] == [0] * (MIN_SAMPLES - 1), "one sample may be a short peak"
    assert samples[-1] > 10**7, "what this process takes"


def test_a_run_alone_on_its_device_has_no_limit(shared):
    assert sample_memory(MemoryGuard(shared.pk)) == [0] * MIN_SAMPLES


def test_memory_within_the_reservation_is_not_reported(shared):
    reserve_other_run(shared)
    Allocation.objects.filter(run_id=shared.pk).update(reserved_bytes=10**12)
    assert sample_memory(MemoryGuard(shared.pk)) == [0] * MIN_SAMPLES


def test_a_device_that_is_shared_after_the_run_began_has_a_limit(shared):
    Pool.objects.update(runs_per_device=1)
    guard = MemoryGuard(shared.pk)
    assert sample_memory(guard) == [0] * MIN_SAMPLES
    Pool.objects.update(runs_per_device=2)
    reserve_other_run(shared)
    assert sample_memory(guard)[-1] > 0


def test_each_reading_of_a_gpu_driver_counts_once(shared):
    reserve_other_run(shared)
    Pool.objects.update(kind="H100")
    Device.objects.update(
        processes=[{"pid": os.getpid(), "bytes": 3 * GB}, {"pid": 1, "bytes": 50 * GB}]
    )
    guard = MemoryGuard(shared.pk)
    assert sample_memory(guard, 10) == [0] * 10, "one reading, looked at ten times"
    samples = []
    for _ in range(MIN_SAMPLES - 1):
        Host.objects.update(reported_at=timezone.now())
        samples += sample_memory(guard, 2)
    assert samples[-1] == 3 * GB


def test_the_allocator_limit_is_the_reservation_without_the_cuda_context(shared):
    Pool.objects.update(kind="H100")
    Allocation.objects.update(reserved_bytes=3 * GB)
    assert MemoryGuard(shared.pk).build_device_environment()["SNAPML_DEVICE_BYTES"] == str(
        3 * GB - CONTEXT_BYTES["cuda"]
    )
    Run.objects.update(forecast={"peak": 3 * GB, "context": GB})
    assert MemoryGuard(shared.pk).build_device_environment()["SNAPML_DEVICE_BYTES"] == str(
        2 * GB
    ), "what its forecast added"
    Pool.objects.update(runs_per_device=1)
    assert "SNAPML_DEVICE_BYTES" not in MemoryGuard(shared.pk).build_device_environment()


def test_the_cuda_context_is_measured_once_per_device_and_then_forecast(shared):
    Pool.objects.update(kind="H100")
    Device.objects.update(processes=[{"pid": os.getpid(), "bytes": 3 * GB}])
    assert get_fixed_overhead(get_target_device()).context == CONTEXT_BYTES["cuda"]

    def step(seq, reserved):
        fields = {"devices": [{"device": "cuda:0", "reserved_bytes": reserved}]}
        Event.objects.create(
            run=shared, seq=seq, kind="step", step=seq, time=time.time(), fields=fields
        )

    def report_host():
        Host.objects.update(reported_at=timezone.now())

    def measure_bytes():
        measure_context(MemoryGuard(shared.pk).allocation, os.getpid())
        return Device.objects.get().context_bytes

    step(1, 1 * GB)
    report_host()
    assert measure_bytes() is None, "no step since"
    step(2, 2 * GB)
    assert measure_bytes() is None, "the allocator grew meanwhile"
    report_host()
    Event.objects.create(run=shared, seq=3, kind="start", step=2, time=time.time(), fields={})
    step(4, 2 * GB)
    assert measure_bytes() is None, "the step before was another attempt's"
    report_host()
    step(5, 2 * GB)
    assert measure_bytes() == 1 * GB
    assert get_fixed_overhead(get_target_device()).context == 1 * GB
    report_host()
    step(6, 2 * GB)
    Device.objects.update(processes=[{"pid": os.getpid(), "bytes": 5 * GB}])
    assert measure_bytes() == 1 * GB, "once is enough"


def test_a_run_that_needs_more_than_its_quota_fails_out_of_memory(
    shared,
):
    assert raise_forecast(shared, 4 * GB)["peak"] == 42 * GB // 10
    quota = Quota.objects.create(pool=Pool.objects.get(), team=shared.team, max_bytes=41 * GB // 10)
    assert raise_forecast(shared, 4 * GB)["peak"] == 41 * GB // 10
    quota.max_bytes = 3 * GB
    quota.save()
    assert raise_forecast(shared, 4 * GB) is None
    run_supervisor = RunSupervisor(Lease(shared.pk, Run.objects.get().lease_token))
    run_supervisor.engine = FakeEngine(75)
    run_supervisor.usage_over_limit = 4 * GB
    Run.objects.update(state=State.RUNNING)
    run_supervisor.handle_exit()
    shared.refresh_from_db()
    assert (shared.state, shared.failure) == (State.FAILED, "out_of_memory")
    assert "4.0 GB" in shared.message


def test_a_run_over_its_reservation_saves_a_checkpoint_and_reserves_more(
    launched, alice, monkeypatch
):
    monkeypatch.setattr(supervisor, "MEMORY_CHECK_SECONDS", 0.05)
    Pool.objects.update(runs_per_device=2)
    run = launched(max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    Run.objects.filter(pk=run.pk).update(forecast={"peak": 10**6})
    thread = start_supervisor(run)
    wait_until(lambda: Run.objects.get(pk=run.pk).step > 0)
    reserve_other_run(run)
    thread.join(60)
    run.refresh_from_db()
    assert_mentions(run.message, "reserved 1.0 MB", "no steps are lost")
    assert run.state == State.QUEUED and run.forecast["peak"] > 10**8
    assert any((run.folder / "checkpoints").iterdir())
