"""Hosts report their devices; one that stops is gone, and one whose memory is still held after its run is not given out."""

from datetime import timedelta

import pytest
from django.utils import timezone

from training.errors import NotAllowed
from training.gpus import devices, quotas, reserve
from training.gpus.devices import Reading, read_cpu, report
from training.gpus.models import Allocation, AuditEntry, Device, Host, Pool
from training.runs.target import kind_of

pytestmark = pytest.mark.django_db
GB = 10**9


def card(used=1 * GB, index=0, **changes):
    values = {"utilisation": 0.5, "temperature": 60.0, "power_watts": 300.0, "processes": [{"pid": 7, "bytes": used}]}
    return Reading(index, f"GPU-{index}", "NVIDIA H200", "NVIDIA H200", 140 * GB, used, **(values | changes))


def test_a_host_without_a_card_reports_its_cpu_with_its_memory():
    report()
    device = Device.objects.get()
    assert (device.pool.kind, device.index, device.condition) == (read_cpu().kind, 0, "good")
    assert device.total_bytes > device.used_bytes > 0


def test_a_cpu_has_bf16_where_torch_finds_it_and_is_another_kind_where_not(monkeypatch):
    import torch

    assert devices.has_bf16() == torch.cpu._is_avx512_bf16_supported()
    for has, kind, law in ((True, "CPU", "cpu"), (False, "CPU without bf16", "cpu_fp32")):
        monkeypatch.setattr(devices, "has_bf16", lambda has=has: has)
        assert read_cpu().kind == kind
        assert (kind_of(kind), devices.is_cpu(kind)) == (law, True)


def test_a_host_that_comes_back_with_another_cpu_changes_its_pool(monkeypatch):
    for has, kind in ((True, "CPU"), (False, "CPU without bf16")):
        monkeypatch.setattr(devices, "has_bf16", lambda has=has: has)
        report()
        assert Device.objects.get().pool.kind == kind


def test_cards_of_one_kind_are_a_pool():
    report([card(index=0), card(index=1)])
    report([card(index=2)], host="second")
    assert Pool.objects.get().name == "NVIDIA H200"
    assert [str(device) for device in Device.objects.filter(host__name="second")] == ["second 2"]


def test_a_device_that_its_host_reports_no_more_is_missing_and_comes_back():
    report([card(index=0), card(index=1)])
    report([card(index=0)])
    assert Device.objects.get(uuid="GPU-1").condition == "missing"
    report([card(index=0), card(index=1)])
    assert Device.objects.get(uuid="GPU-1").condition == "good"


def test_a_host_that_does_not_report_is_gone():
    report([card()])
    assert devices.usable(Device.objects.get())
    Host.objects.update(reported_at=timezone.now() - timedelta(seconds=31))
    assert not devices.usable(Device.objects.get())


def hold_and_release(alice):
    device = Device.objects.get()
    reserve.reserve(device, reserve.Holder(1, "run", alice, None, "normal", None))
    reserve.release(1)


def test_memory_that_stays_held_after_a_run_makes_a_device_dirty_until_it_is_given_back(alice, people):
    report([card(used=1 * GB)])
    hold_and_release(alice)
    assert Device.objects.get().condition == "checking"
    report([card(used=60 * GB)])
    assert Device.objects.get().condition == "checking"
    Device.objects.update(changed_at=timezone.now() - timedelta(seconds=31))
    report([card(used=60 * GB)])
    device = Device.objects.get()
    assert (device.condition, devices.usable(device)) == ("dirty", False)
    assert AuditEntry.objects.filter(act="device dirty").count() == 1
    report([card(used=1 * GB)])
    assert Device.objects.get().condition == "good"


def test_a_screen_that_always_uses_memory_does_not_make_a_device_dirty(alice):
    report([card(used=2 * GB)])
    hold_and_release(alice)
    report([card(used=2 * GB + 100_000_000)])
    assert Device.objects.get().condition == "good"


def test_an_admin_may_give_a_dirty_device_out_again(alice, people):
    report([card()])
    Device.objects.update(condition="dirty", used_bytes=60 * GB)
    with pytest.raises(NotAllowed):
        quotas.offer_again(alice, Device.objects.get())
    quotas.offer_again(people["admin"], Device.objects.get(), reason="the notebook beside it may stay")
    report([card(used=60 * GB)])
    assert Device.objects.get().condition == "good"


def test_a_place_on_a_shared_device_is_the_first_that_is_free(alice):
    report([card()])
    device = Device.objects.get()
    for run in (1, 2, 3):
        reserve.reserve(device, reserve.Holder(run, "run", alice, None, "normal", GB))
    reserve.release(2)
    reserve.reserve(device, reserve.Holder(4, "run", alice, None, "normal", GB))
    assert Allocation.objects.get(run_id=4).place == 1


def test_a_card_that_comes_back_under_another_host_name_is_the_same_device():
    report([card()], host="old")
    report([card()], host="new")
    assert str(Device.objects.get()) == "new 0"


def test_a_pool_named_like_another_kind_is_no_trap(people):
    report([card()])
    quotas.edit_pool(people["admin"], Pool.objects.get(), {"name": "CPU"})
    report()
    assert sorted(Pool.objects.values_list("name", flat=True)) == ["CPU", "CPU (new)"]
