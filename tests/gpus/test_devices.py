"""Device reports: offline hosts, missing devices, and memory that is not freed after a run."""

import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.utils import timezone

from tests.user_errors import assert_mentions
from training.errors import NotAllowed
from training.gpus import allocations, devices, quotas
from training.gpus.devices import DeviceReading, read_cpu, update_devices
from training.gpus.models import Allocation, AuditEntry, Device, Host, Pool
from training.runs.forecast.target_device import get_device_kind

pytestmark = pytest.mark.django_db
GB = 10**9


def make_reading(used=1 * GB, index=0, **changes):
    values = {
        "utilization": 0.5,
        "temperature": 60.0,
        "power_watts": 300.0,
        "processes": [{"pid": 7, "bytes": used}],
    }
    return DeviceReading(
        index, f"GPU-{index}", "NVIDIA H200", "NVIDIA H200", 140 * GB, used, **(values | changes)
    )


def test_a_host_without_a_gpu_reports_its_cpu_with_the_memory_of_the_host():
    update_devices()
    device = Device.objects.get()
    assert (device.pool.kind, device.index, device.condition) == (read_cpu().kind, 0, "good")
    assert device.total_bytes > device.used_bytes > 0


def test_bf16_is_detected_like_in_torch_and_a_cpu_without_it_is_a_separate_kind(monkeypatch):
    import torch

    assert devices.has_bf16() == torch.cpu._is_avx512_bf16_supported()
    for has, kind, estimator_kind in (
        (True, "CPU", "cpu"),
        (False, "CPU without bf16", "cpu_fp32"),
    ):
        monkeypatch.setattr(devices, "has_bf16", lambda has=has: has)
        assert read_cpu().kind == kind
        assert (get_device_kind(kind), devices.is_cpu(kind)) == (estimator_kind, True)


def test_a_host_that_returns_with_another_cpu_changes_pools(monkeypatch):
    for has, kind in ((True, "CPU"), (False, "CPU without bf16")):
        monkeypatch.setattr(devices, "has_bf16", lambda has=has: has)
        update_devices()
        assert Device.objects.get().pool.kind == kind


def test_gpus_of_one_kind_form_a_pool():
    update_devices([make_reading(index=0), make_reading(index=1)])
    update_devices([make_reading(index=2)], host="second")
    assert Pool.objects.get().name == "NVIDIA H200"
    assert [str(device) for device in Device.objects.filter(host__name="second")] == ["second 2"]


def test_a_device_that_is_no_longer_reported_is_missing_until_it_returns():
    update_devices([make_reading(index=0), make_reading(index=1)])
    update_devices([make_reading(index=0)])
    assert Device.objects.get(uuid="GPU-1").condition == "missing"
    update_devices([make_reading(index=0), make_reading(index=1)])
    assert Device.objects.get(uuid="GPU-1").condition == "good"


def test_a_host_that_does_not_report_is_offline():
    update_devices([make_reading()])
    assert devices.is_schedulable(Device.objects.get())
    Host.objects.update(reported_at=timezone.now() - timedelta(seconds=31))
    assert not devices.is_schedulable(Device.objects.get())


def hold_and_release(alice):
    device = Device.objects.get()
    allocations.reserve_device(
        device, allocations.AllocationRequest(1, "run", alice, None, "normal", None)
    )
    allocations.release_device(1)


def test_memory_that_stays_in_use_after_a_run_makes_a_device_dirty_until_it_is_freed(alice, people):
    update_devices([make_reading(used=1 * GB)])
    hold_and_release(alice)
    assert Device.objects.get().condition == "checking"
    update_devices([make_reading(used=60 * GB)])
    assert Device.objects.get().condition == "checking"
    Device.objects.update(condition_changed_at=timezone.now() - timedelta(seconds=31))
    update_devices([make_reading(used=60 * GB)])
    device = Device.objects.get()
    assert (device.condition, devices.is_schedulable(device)) == ("dirty", False)
    assert AuditEntry.objects.filter(action="device dirty").count() == 1
    update_devices([make_reading(used=1 * GB)])
    assert Device.objects.get().condition == "good"


def test_memory_that_was_in_use_before_the_run_does_not_make_a_device_dirty(alice):
    update_devices([make_reading(used=2 * GB)])
    hold_and_release(alice)
    update_devices([make_reading(used=2 * GB + 100_000_000)])
    assert Device.objects.get().condition == "good"


def test_an_admin_can_return_a_dirty_device_to_its_pool(alice, people):
    update_devices([make_reading()])
    Device.objects.update(condition="dirty", used_bytes=60 * GB)
    with pytest.raises(NotAllowed):
        quotas.return_to_service(alice, Device.objects.get())
    quotas.return_to_service(
        people["admin"], Device.objects.get(), reason="the notebook on it may stay"
    )
    update_devices([make_reading(used=60 * GB)])
    assert Device.objects.get().condition == "good"


def test_a_run_gets_the_first_free_slot_of_a_shared_device(alice):
    update_devices([make_reading()])
    device = Device.objects.get()
    for run in (1, 2, 3):
        allocations.reserve_device(
            device, allocations.AllocationRequest(run, "run", alice, None, "normal", GB)
        )
    allocations.release_device(2)
    allocations.reserve_device(
        device, allocations.AllocationRequest(4, "run", alice, None, "normal", GB)
    )
    assert Allocation.objects.get(run_id=4).slot == 1


def test_a_gpu_that_returns_under_another_host_name_is_the_same_device():
    update_devices([make_reading()], host="old")
    update_devices([make_reading()], host="new")
    assert str(Device.objects.get()) == "new 0"


def test_a_pool_may_have_the_name_of_another_kind(people):
    update_devices([make_reading()])
    quotas.edit_pool(people["admin"], Pool.objects.get(), {"name": "CPU"})
    update_devices()
    assert sorted(Pool.objects.values_list("name", flat=True)) == ["CPU", "CPU (new)"]


class FakeNvml:
    """A fake pynvml with GPUs of 80 GB, some of which have failed."""

    class NVMLError(Exception):
        pass

    def __init__(self, num_gpus=2, lost=(), processes=(), driver=True):
        self.num_gpus, self.lost, self.processes, self.driver = num_gpus, lost, processes, driver

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index):
        if index in self.lost:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 * GB, used=20 * GB)

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA A100"

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}"

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 50

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=25)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self.processes


def read_fake_devices(monkeypatch, **choices):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**choices))
    return devices.read_devices()


def test_a_gpu_that_cannot_be_read_is_missing_and_not_replaced_by_the_cpu(monkeypatch, caplog):
    update_devices(read_fake_devices(monkeypatch, num_gpus=3))
    update_devices(read_fake_devices(monkeypatch, num_gpus=3, lost={1}))
    assert dict(Device.objects.values_list("uuid", "condition")) == {
        "GPU-0": "good",
        "GPU-1": "missing",
        "GPU-2": "good",
    }
    assert_mentions(caplog.text, "GPU 1", "GPU is lost")
    update_devices(read_fake_devices(monkeypatch, num_gpus=1, lost={0}))
    assert set(Device.objects.values_list("condition", "name")) == {("missing", "NVIDIA A100")}


def test_a_value_that_a_gpu_does_not_report_is_unknown(monkeypatch):
    reading = read_fake_devices(monkeypatch, num_gpus=1)[0]
    assert (reading.utilization, reading.temperature, reading.power_watts) == (0.25, 50.0, None)


@pytest.mark.parametrize("choices", [{"num_gpus": 0}, {"driver": False}])
def test_a_host_without_gpus_or_driver_uses_its_cpu(monkeypatch, choices):
    assert [one.kind for one in read_fake_devices(monkeypatch, **choices)] == [read_cpu().kind]


def test_a_gpu_that_returns_with_memory_in_use_is_checked_first(alice, people):
    update_devices([make_reading(used=1 * GB)])
    hold_and_release(alice)
    update_devices([])
    update_devices([make_reading(used=30 * GB)])
    assert Device.objects.get().condition == "checking"
    update_devices([make_reading(used=1 * GB)])
    assert Device.objects.get().condition == "good"


def test_a_gpu_that_was_missing_for_a_moment_during_a_run_is_good(alice):
    update_devices([make_reading(used=1 * GB)])
    allocations.reserve_device(
        Device.objects.get(), allocations.AllocationRequest(1, "run", alice, None, "normal", None)
    )
    update_devices([])
    update_devices([make_reading(used=30 * GB)])
    assert Device.objects.get().condition == "good"


def test_memory_of_the_inference_server_does_not_make_a_device_dirty(monkeypatch, alice):
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "adapters.inference"]
    ) as inference_process:
        try:
            others = SimpleNamespace(pid=os.getpid(), usedGpuMemory=6 * GB)
            ours = SimpleNamespace(pid=inference_process.pid, usedGpuMemory=14 * GB)
            readings = read_fake_devices(monkeypatch, num_gpus=1, processes=[others, ours])
        finally:
            inference_process.kill()
    assert readings[0].inference_bytes == 14 * GB
    update_devices([make_reading(used=1 * GB)])
    hold_and_release(alice)
    update_devices([make_reading(used=15 * GB, inference_bytes=14 * GB)])
    assert Device.objects.get().condition == "good"


def test_leftover_memory_of_a_run_is_detected_despite_the_inference_server(alice):
    update_devices([make_reading(used=15 * GB, inference_bytes=14 * GB)])
    hold_and_release(alice)
    update_devices([make_reading(used=27 * GB, inference_bytes=14 * GB)])
    assert Device.objects.get().condition == "checking"


def test_memory_of_a_finished_run_is_free_before_the_next_report_of_a_cpu(alice):
    update_devices()
    device = Device.objects.get()
    Device.objects.update(used_bytes=2 * GB)
    device.refresh_from_db()
    allocations.reserve_device(
        device, allocations.AllocationRequest(1, "run", alice, None, "normal", GB)
    )
    Device.objects.update(used_bytes=9 * GB)
    allocations.release_device(1)
    assert Device.objects.get().used_bytes == 2 * GB
