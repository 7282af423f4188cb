"""The queue: runs get devices, show their position and reason while they wait, are evicted, and
release their devices.
"""

import math
import signal
from datetime import timedelta

import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from tests import tiny
from tests.launching import launch_run
from tests.runs.fake_engine import FakeEngine
from tests.runs.supervision import add_checkpoint
from tests.user_errors import assert_mentions, raises_user_error
from training.errors import Conflict, NotAllowed
from training.gpus import allocations, quotas
from training.gpus.devices import DeviceReading, update_devices
from training.gpus.models import Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota
from training.people.models import Team
from training.runs.actions import continue_run, stop_run
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Event, Run
from training.runs.queue import actions, admission, checks, durations, queue_info
from training.runs.states import RequestedAction, State
from training.runs.worker.lease import claim_run
from training.runs.worker.supervisor import RunSupervisor

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture
def make_run(run):
    def create(**changes):
        new_run = Run.objects.get(pk=run.pk)
        new_run.pk = None
        defaults = {
            "queued_at": timezone.now(),
            "name": "another",
            "state": State.QUEUED,
            "queue_info": {},
            "step": 0,
            "total_steps": 0,
        }
        defaults |= {"lease_token": "", "lease_owner": "", "seconds_per_step": None}
        for name, value in (defaults | changes).items():
            setattr(new_run, name, value)
        new_run.save()
        new_run.folder.mkdir(parents=True, exist_ok=True)
        return new_run

    return create


def get_queue_info(run):
    return Run.objects.get(pk=run.pk).queue_info


def make_ended_supervisor(run, code=75):
    supervisor = RunSupervisor(claim_run(run.pk))
    supervisor.engine = FakeEngine(code)
    return supervisor


def test_an_admitted_run_keeps_its_device_until_its_engine_has_exited(run, device):
    supervisor = make_ended_supervisor(run)
    allocation = Allocation.objects.get()
    assert (allocation.run_id, allocation.device, allocation.released_at, allocation.user) == (
        run.pk,
        device,
        None,
        run.owner,
    )
    supervisor.requeue_run("offline")
    allocation.refresh_from_db()
    assert allocation.released_at is not None


def test_the_database_rejects_double_booking(run, make_run, device):
    allocation_request = allocations.AllocationRequest(
        run.pk, run.name, run.owner, None, "normal", None
    )
    allocations.reserve_device(device, allocation_request)
    with pytest.raises(IntegrityError), transaction.atomic():
        Allocation.objects.create(
            device=device,
            slot=0,
            run_id=99,
            run_name="",
            user=run.owner,
            priority="normal",
            started_at=timezone.now(),
        )
    with pytest.raises(IntegrityError), transaction.atomic():
        Allocation.objects.create(
            device=device,
            slot=1,
            run_id=run.pk,
            run_name="",
            user=run.owner,
            priority="normal",
            started_at=timezone.now(),
        )


def test_a_waiting_run_shows_its_position_reason_and_estimated_start(run, make_run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, step=10, total_steps=110, seconds_per_step=6.0
    )
    second, third = make_run(), make_run()
    queue_info.refresh_queue()
    now = timezone.now().timestamp()
    assert (
        get_queue_info(second)["position"],
        get_queue_info(third)["position"],
        get_queue_info(third)["total"],
    ) == (1, 2, 2)
    assert get_queue_info(second)["code"] == "full"
    assert_mentions(get_queue_info(second)["reason"], "CPU")
    assert 590 < get_queue_info(second)["earliest"] - now < 610
    assert 890 < get_queue_info(second)["latest"] - now < 910
    assert get_queue_info(third)["latest"] is None  # no run of this kind has finished


def test_the_revision_changes_only_if_the_queue_info_is_new(run, make_run):
    claim_run(run.pk)
    second = make_run()
    queue_info.refresh_queue()
    before = Run.objects.get(pk=second.pk).revision
    queue_info.refresh_queue()
    assert Run.objects.get(pk=second.pk).revision == before
    make_run(queued_at=timezone.now() - timedelta(days=1))
    queue_info.refresh_queue()
    assert Run.objects.get(pk=second.pk).revision == before + 1


def test_a_run_within_its_guarantee_evicts_a_borrowed_run_with_a_checkpoint(run, make_run, people):
    others = Team.objects.get(name="others")
    Quota.objects.create(pool=Pool.objects.get(), team=others, guaranteed=1)
    supervisor = make_ended_supervisor(run)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=1))
    urgent = make_run(team=others, owner=people["mallory"])
    queue_info.refresh_queue()
    allocation = Allocation.objects.get(run_id=run.pk)
    assert allocation.evicted_for == urgent.pk
    assert Device.objects.get().reserved_for == urgent.pk
    assert get_queue_info(urgent)["code"] == "evicting"
    assert_mentions(get_queue_info(urgent)["reason"], f"run {run.pk}")
    supervisor.check_requests()
    assert supervisor.engine.requests == [signal.SIGTERM]
    Run.objects.filter(pk=run.pk).update(step=12)
    Event.objects.create(run=run, seq=1, kind="checkpoint", step=10, time=1.0, fields={})
    supervisor.handle_exit()
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert_mentions(run.message, f"run {urgent.pk}", "step 12", "2 steps")
    assert admission.admit_runs() == [urgent.pk]
    assert {entry.action for entry in AuditEntry.objects.all()} == {"admitted", "preempted"}


def test_a_device_reserved_for_a_cancelled_run_is_free_again(run, make_run, device):
    waiting = make_run()
    Device.objects.update(reserved_for=waiting.pk)
    stop_run(waiting, discard=True)
    assert admission.admit_runs() == [run.pk]


def test_a_run_without_a_forecast_does_not_share_its_device(run, make_run):
    Pool.objects.update(runs_per_device=2)
    Run.objects.filter(pk=run.pk).update(forecast={})
    make_run(forecast={"peak": 1 * GB})
    assert admission.admit_runs() == [run.pk]


def test_runs_of_an_offline_host_are_requeued_and_resume_on_another(run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, lease_expires_at=timezone.now() - timedelta(seconds=1)
    )
    host = Host.objects.get()
    Host.objects.update(reported_at=timezone.now() - timedelta(minutes=5))
    assert admission.admit_runs() == []
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert_mentions(run.message, host.name)
    update_devices([DeviceReading(0, "other", "CPU, 8 cores", "CPU", 64 * GB, 0)], host="elsewhere")
    assert admission.admit_runs() == [run.pk]
    assert Allocation.objects.get(released_at=None).device.host.name == "elsewhere"
    assert claim_run(run.pk) is None  # only a worker of the other host can claim it


def test_a_run_stops_at_its_time_limit(run):
    supervisor = make_ended_supervisor(run)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, max_run_seconds=3600)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=2))
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    admission.admit_runs()
    run.refresh_from_db()
    assert (run.state, run.requested_action) == (State.STOPPING, RequestedAction.TIME_LIMIT)
    supervisor.check_requests()
    assert supervisor.engine.requests == ["save"]
    supervisor.handle_exit()
    run.refresh_from_db()
    assert run.state == State.STOPPED
    assert_mentions(run.message, f"step {run.step}", "time limit", "Nothing was saved")


def test_hold_and_drain_evicts_running_runs_and_hold_alone_does_not(run, make_run, people):
    claim_run(run.pk)
    pool = Pool.objects.get()
    with raises_user_error(NotAllowed, code="hold_not_allowed"):
        quotas.set_hold(people["bob"], quotas.get_quota(pool, run.team), is_on_hold=True)
    quotas.set_hold(
        people["admin"], quotas.get_quota(pool, run.team), is_on_hold=True, reason="maintenance"
    )
    assert Allocation.objects.get().evicted_at is None
    waiting = make_run()
    queue_info.refresh_queue()
    assert get_queue_info(waiting)["code"] == "team_on_hold"
    assert_mentions(get_queue_info(waiting)["reason"], run.team.name)
    quotas.set_hold(people["admin"], quotas.get_quota(pool, run.team), is_on_hold=True, drain=True)
    assert Allocation.objects.get().evicted_at is not None
    Allocation.objects.update(released_at=timezone.now())
    quotas.set_hold(people["admin"], quotas.get_quota(pool, run.team), is_on_hold=False)
    assert admission.admit_runs() == [waiting.pk]


def test_a_run_that_can_never_fit_is_rejected_at_launch(
    alice, base_model, data, device, no_queue, monkeypatch
):
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 30 * GB}
    )
    with raises_user_error(code="never_fits", naming=("30.0 GB", "24.0 GB", "CPU")):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 20 * GB}
    )
    Quota.objects.create(pool=Pool.objects.get(), team=data.dataset.team, max_bytes=10 * GB)
    with raises_user_error(code="max_memory", naming=("10.0 GB",)):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_a_user_cannot_queue_more_runs_than_their_limit(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, max_queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_a_user_without_a_limit_has_the_default_one(run, alice, base_model, data, settings):
    settings.MAX_QUEUED_RUNS = 1
    with raises_user_error(Conflict, code="queue_full"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    PersonalQuota.objects.create(user=alice, max_queued=2)
    launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_only_admins_grant_urgent_priority(run, people):
    with raises_user_error(NotAllowed, code="urgent_admin_only"):
        actions.change_priority(run.owner, run, "urgent")
    actions.change_priority(run.owner, run, "background")
    actions.change_priority(people["admin"], run, "urgent", reason="demo at noon")
    run.refresh_from_db()
    assert run.priority == "urgent"
    assert AuditEntry.objects.filter(action="priority", actor=people["admin"]).count() == 1


def test_a_run_that_was_moved_up_starts_first(run, make_run):
    second = make_run()
    actions.move_up(second)
    assert admission.admit_runs() == [second.pk]


def test_a_stopped_run_that_is_continued_counts_against_the_queue_limit(run, make_run, alice):
    stopped = make_run(state=State.STOPPED)
    PersonalQuota.objects.create(user=alice, max_queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        continue_run(alice, stopped)


def test_only_an_admin_can_continue_a_run_that_reached_its_time_limit(run, people):
    claim_run(run.pk)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, max_run_seconds=3600)
    Allocation.objects.update(
        started_at=timezone.now() - timedelta(hours=2), released_at=timezone.now()
    )
    Run.objects.filter(pk=run.pk).update(
        state=State.STOPPED, lease_token="", lease_owner="", lease_expires_at=None
    )
    run.refresh_from_db()
    with raises_user_error(NotAllowed, code="time_limit_reached", naming=("1.0 h",)):
        continue_run(run.owner, run)
    continue_run(people["admin"], run)
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    admission.admit_runs()
    assert Run.objects.get(pk=run.pk).state == State.RUNNING


def test_new_runs_do_not_wait_for_devices_of_an_offline_host(run):
    update_devices([DeviceReading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="retired")
    assert get_target_device().pool.kind == "H100"
    Host.objects.filter(name="retired").update(reported_at=timezone.now() - timedelta(days=30))
    assert get_target_device().pool.kind == "CPU"


def test_a_stop_request_during_an_eviction_stops_the_run(run, make_run):
    supervisor = make_ended_supervisor(run)
    Allocation.objects.update(evicted_at=timezone.now())
    supervisor.check_requests()
    Run.objects.filter(pk=run.pk).update(
        requested_action=RequestedAction.STOP, state=State.STOPPING, step=5, last_seq=1
    )
    Event.objects.create(run=run, seq=1, kind="end", time=1.0, fields={"outcome": "preempted"})
    add_checkpoint(run)
    supervisor.handle_exit()
    run.refresh_from_db()
    assert run.state == State.STOPPED
    assert_mentions(run.message, "step 5", "checkpoint")


def test_a_run_with_an_assigned_device_cannot_change_pools(run, alice):
    update_devices([DeviceReading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="second")
    admission.admit_runs()
    with raises_user_error(Conflict, code="device_assigned"):
        actions.change_pool(alice, run, Pool.objects.get(kind="H100"))


def test_the_device_of_an_ended_run_is_released_if_its_worker_died(run, make_run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.FAILED)
    second = make_run()
    assert admission.admit_runs() == [second.pk]


def test_the_api_lists_the_queue(run, make_run, as_alice):
    claim_run(run.pk)
    second = make_run()
    queue_info.refresh_queue()
    [item] = as_alice.get("/api/v1/runs/queue").json()["items"]
    assert (item["id"], item["owner"], item["pool"], item["position"]) == (
        second.pk,
        "alice",
        "CPU",
        1,
    )
    assert item["reason"] == get_queue_info(second)["reason"] and item["latest"] is None


def test_a_run_shows_its_assigned_device_until_a_worker_claims_it(run, make_run, as_alice):
    second = make_run()
    assert admission.admit_runs() == [run.pk]
    queue_info.refresh_queue()
    assert_mentions(as_alice.get(f"/runs/{run.pk}").content.decode(), Device.objects.get())
    assert_mentions(as_alice.get("/api/v1/runs/queue").content.decode(), Device.objects.get())
    page = as_alice.get("/gpus").content.decode()
    assert_mentions(page, Device.objects.get(), second.name)


def test_only_admins_change_the_priority_of_a_run_with_a_device(run, people):
    claim_run(run.pk)
    with raises_user_error(NotAllowed, code="device_in_use"):
        actions.change_priority(run.owner, run, "background")
    actions.change_priority(people["admin"], run, "background")
    assert Allocation.objects.get().priority == "background"


def test_reached_and_waived_time_limits_are_in_the_audit_log(run, people):
    test_a_run_stops_at_its_time_limit(run)
    assert AuditEntry.objects.get(action="time limit reached").subject == f"run {run.pk}"
    admission.admit_runs()
    assert AuditEntry.objects.filter(action="time limit reached").count() == 1
    checks.check_time_limit(people["admin"], run)
    entry = AuditEntry.objects.get(action="time waived")
    assert (entry.actor, entry.before, round(entry.after["waived_seconds"] / 3600)) == (
        people["admin"],
        {"waived_seconds": 0.0},
        2,
    )


def test_a_device_limit_of_zero_is_an_error_at_launch(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, max_running=0)
    with raises_user_error(code="user_has_no_device"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    PersonalQuota.objects.update(max_running=1)
    quota = Quota.objects.create(pool=Pool.objects.get(), team=run.team, limit=0)
    with raises_user_error(code="team_has_no_device", field="pool"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    Quota.objects.filter(pk=quota.pk).update(limit=1)
    launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def make_finished_run(make_run, device, *, steps, seconds):
    """A run that took `seconds` on its device for `steps`, after a day in the queue."""
    now = timezone.now()
    finished_run = make_run(
        state=State.FINISHED, total_steps=steps, started_at=now - timedelta(days=1), finished_at=now
    )
    interval = {"started_at": now - timedelta(seconds=seconds), "released_at": now}
    Allocation.objects.create(
        device=device, run_id=finished_run.pk, user=finished_run.owner, reserved_bytes=1, **interval
    )


def test_expected_durations_come_from_the_device_time_of_finished_runs(run, make_run, device):
    for steps, seconds in ((10, 20), (10, 30), (100, 200)):
        make_finished_run(make_run, device, steps=steps, seconds=seconds)
    typical_durations = durations.get_typical_durations()
    assert durations.estimate_remaining_seconds(
        make_run(total_steps=1000), typical_durations
    ) == pytest.approx(2000, rel=0.01)
    assert durations.estimate_remaining_seconds(
        make_run(total_steps=1000, step=900), typical_durations
    ) == pytest.approx(200, rel=0.01)
    assert durations.estimate_remaining_seconds(make_run(), typical_durations) == pytest.approx(
        30, rel=0.01
    )
    assert (
        durations.estimate_remaining_seconds(
            make_run(method="full", total_steps=10), typical_durations
        )
        == math.inf
    )


def test_the_number_of_steps_is_known_at_launch(alice, base_model, data, device, no_queue):
    from training.runs.forecast.token_lengths import get_lengths

    get_lengths(data, base_model)
    launched = launch_run(
        alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "max_steps": 7}
    )
    assert launched.total_steps == 7
    assert (
        launch_run(
            alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "max_steps": 0}
        ).total_steps
        > 0
    )


def test_memory_used_by_other_processes_is_not_assigned_to_a_run(run, make_run, device):
    Run.objects.filter(pk=run.pk).update(forecast={"peak": device.total_bytes - GB})
    Device.objects.update(used_bytes=2 * GB)
    assert admission.admit_runs() == []
    queue_info.refresh_queue()
    assert_mentions(get_queue_info(run)["reason"], "2.0 GB used by other processes")
    Device.objects.update(used_bytes=GB // 2)
    assert admission.admit_runs() == [run.pk]
    Device.objects.update(used_bytes=device.total_bytes)
    assert (
        admission.build_pool_state(device.pool, [], timezone.now(), {}).devices[0].used_by_others
        == GB // 2
    ), "the run's own memory is not used by others"
