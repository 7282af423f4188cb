"""A waiting run gets a device from the one queue, is told its place and reason, makes room, and
gives its device back.
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
from tests.user_errors import assert_mentions, raises_user_error
from training.errors import Conflict, NotAllowed, UserError
from training.gpus import allocations, quotas
from training.gpus.devices import DeviceReading, update_devices
from training.gpus.models import Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota
from training.people.models import Team
from training.runs.actions import continue_run, stop_run
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Event, Run
from training.runs.queue import actions, admission, checks, durations, reasons
from training.runs.states import RequestedAction, State
from training.runs.worker import outcomes
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


def test_an_admitted_run_holds_its_device_until_its_engine_is_gone(run, device):
    supervisor = make_ended_supervisor(run)
    allocation = Allocation.objects.get()
    assert (allocation.run_id, allocation.device, allocation.released_at, allocation.user) == (
        run.pk,
        device,
        None,
        run.owner,
    )
    supervisor.requeue_run("gone")
    allocation.refresh_from_db()
    assert allocation.released_at is not None


def test_the_database_itself_refuses_a_device_twice(run, make_run, device):
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


def test_a_waiting_run_is_told_its_place_its_reason_and_when_it_should_start(run, make_run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, step=10, total_steps=110, seconds_per_step=6.0
    )
    second, third = make_run(), make_run()
    reasons.refresh_queue()
    now = timezone.now().timestamp()
    assert (
        get_queue_info(second)["position"],
        get_queue_info(third)["position"],
        get_queue_info(third)["total"],
    ) == (1, 2, 2)
    assert "and the one device of CPU is in use" in get_queue_info(second)["reason"]
    assert 590 < get_queue_info(second)["earliest"] - now < 610
    assert 890 < get_queue_info(second)["latest"] - now < 910
    assert get_queue_info(third)["latest"] is None  # nobody knows yet how long such a run takes


def test_the_words_move_the_page_only_when_something_is_new(run, make_run):
    claim_run(run.pk)
    second = make_run()
    reasons.refresh_queue()
    before = Run.objects.get(pk=second.pk).revision
    reasons.refresh_queue()
    assert Run.objects.get(pk=second.pk).revision == before
    make_run(queued_at=timezone.now() - timedelta(days=1))
    reasons.refresh_queue()
    assert Run.objects.get(pk=second.pk).revision == before + 1


def test_a_run_inside_its_guarantee_makes_a_borrowed_one_save_and_leave(run, make_run, people):
    others = Team.objects.get(name="others")
    Quota.objects.create(pool=Pool.objects.get(), team=others, guaranteed=1)
    supervisor = make_ended_supervisor(run)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=1))
    urgent = make_run(team=others, owner=people["mallory"])
    reasons.refresh_queue()
    allocation = Allocation.objects.get(run_id=run.pk)
    assert allocation.evicted_for == urgent.pk
    assert Device.objects.get().reserved_for == urgent.pk
    assert (
        get_queue_info(urgent)["reason"]
        == f"starts when run {run.pk} has saved its checkpoint and left its device."
    )
    supervisor.check_requests()
    assert supervisor.engine.requests == [signal.SIGTERM]
    Run.objects.filter(pk=run.pk).update(step=12)
    Event.objects.create(run=run, seq=1, kind="checkpoint", step=10, time=1.0, fields={})
    supervisor.handle_exit()
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert (
        f"Stopped for run {urgent.pk} at step 12; 2 steps since its checkpoint are trained again."
        in run.message
    )
    assert admission.admit_runs() == [urgent.pk]
    assert {entry.action for entry in AuditEntry.objects.all()} == {"admitted", "preempted"}


def test_a_device_kept_for_a_run_that_is_cancelled_is_free_again(run, make_run, device):
    waiting = make_run()
    Device.objects.update(reserved_for=waiting.pk)
    stop_run(waiting, discard=True)
    assert admission.admit_runs() == [run.pk]


def test_a_run_without_a_forecast_has_its_device_alone(run, make_run):
    Pool.objects.update(runs_per_device=2)
    Run.objects.filter(pk=run.pk).update(forecast={})
    make_run(forecast={"peak": 1 * GB})
    assert admission.admit_runs() == [run.pk]


def test_runs_of_a_host_that_is_gone_wait_again_and_go_on_elsewhere(run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, lease_expires_at=timezone.now() - timedelta(seconds=1)
    )
    Host.objects.update(reported_at=timezone.now() - timedelta(minutes=5))
    assert admission.admit_runs() == []
    run.refresh_from_db()
    assert run.state == State.QUEUED and "is gone" in run.message
    update_devices([DeviceReading(0, "other", "CPU, 8 cores", "CPU", 64 * GB, 0)], host="elsewhere")
    assert admission.admit_runs() == [run.pk]
    assert Allocation.objects.get(released_at=None).device.host.name == "elsewhere"
    assert claim_run(run.pk) is None  # that is for a worker of the other host


def test_a_run_ends_when_it_has_held_devices_for_as_long_as_it_may(run):
    supervisor = make_ended_supervisor(run)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, max_run_seconds=3600)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=2))
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    admission.admit_runs()
    run.refresh_from_db()
    assert (run.state, run.requested_action) == (State.STOPPING, RequestedAction.TIME_LIMIT)
    assert "as long as its team's runs may" in outcomes.format_time_limit_message(run)
    supervisor.check_requests()
    assert supervisor.engine.requests == ["save"]


def test_hold_and_drain_stops_what_runs_with_a_checkpoint_and_hold_alone_does_not(
    run, make_run, people
):
    claim_run(run.pk)
    pool = Pool.objects.get()
    with pytest.raises(NotAllowed):
        quotas.set_hold(people["bob"], quotas.get_quota(pool, run.team), is_on_hold=True)
    quotas.set_hold(
        people["admin"], quotas.get_quota(pool, run.team), is_on_hold=True, reason="maintenance"
    )
    assert Allocation.objects.get().evicted_at is None
    waiting = make_run()
    reasons.refresh_queue()
    assert "is on hold" in get_queue_info(waiting)["reason"]
    quotas.set_hold(people["admin"], quotas.get_quota(pool, run.team), is_on_hold=True, drain=True)
    assert Allocation.objects.get().evicted_at is not None
    Allocation.objects.update(released_at=timezone.now())
    quotas.set_hold(people["admin"], quotas.get_quota(pool, run.team), is_on_hold=False)
    assert admission.admit_runs() == [waiting.pk]


def test_what_can_never_run_is_refused_at_launch(
    alice, base_model, data, device, no_queue, monkeypatch
):
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 30 * GB}
    )
    with pytest.raises(
        UserError, match=r"needs 30.0 GB, and the largest device of CPU has 24.0 GB"
    ):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 20 * GB}
    )
    Quota.objects.create(pool=Pool.objects.get(), team=data.dataset.team, max_bytes=10 * GB)
    with raises_user_error(code="most_memory", naming=("10.0 GB",)):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_nobody_queues_more_than_their_quota(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, max_queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_urgent_is_granted_by_admins(run, people):
    with pytest.raises(NotAllowed):
        actions.change_priority(run.owner, run, "urgent")
    actions.change_priority(run.owner, run, "background")
    actions.change_priority(people["admin"], run, "urgent", reason="demo at noon")
    run.refresh_from_db()
    assert run.priority == "urgent"
    assert AuditEntry.objects.filter(action="class", actor=people["admin"]).count() == 1


def test_owners_move_their_own_runs_up(run, make_run):
    second = make_run()
    actions.move_up(second)
    assert admission.admit_runs() == [second.pk]


def test_a_stopped_run_that_goes_on_counts_in_the_queue_too(run, make_run, alice):
    stopped = make_run(state=State.STOPPED)
    PersonalQuota.objects.create(user=alice, max_queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        continue_run(alice, stopped)


def test_an_admin_lets_a_run_go_on_that_has_used_its_time(run, people):
    claim_run(run.pk)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, max_run_seconds=3600)
    Allocation.objects.update(
        started_at=timezone.now() - timedelta(hours=2), released_at=timezone.now()
    )
    Run.objects.filter(pk=run.pk).update(
        state=State.STOPPED, lease_token="", lease_owner="", lease_expires_at=None
    )
    run.refresh_from_db()
    with raises_user_error(NotAllowed, code="time_used_up", naming=("1.0 h",)):
        continue_run(run.owner, run)
    continue_run(people["admin"], run)
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    admission.admit_runs()
    assert Run.objects.get(pk=run.pk).state == State.RUNNING


def test_new_runs_do_not_wait_for_devices_that_are_long_gone(run):
    update_devices([DeviceReading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="retired")
    assert get_target_device().pool.kind == "H100"
    Host.objects.filter(name="retired").update(reported_at=timezone.now() - timedelta(days=30))
    assert get_target_device().pool.kind == "CPU"


def test_a_stop_while_it_makes_room_is_a_stop(run, make_run):
    supervisor = make_ended_supervisor(run)
    Allocation.objects.update(evicted_at=timezone.now())
    supervisor.check_requests()
    Run.objects.filter(pk=run.pk).update(
        requested_action=RequestedAction.STOP, state=State.STOPPING, step=5, last_seq=1
    )
    Event.objects.create(run=run, seq=1, kind="end", time=1.0, fields={"outcome": "preempted"})
    (run.folder / "checkpoints").mkdir()
    supervisor.handle_exit()
    run.refresh_from_db()
    assert (run.state, run.message) == (
        State.STOPPED,
        "Stopped after step 5; its checkpoint is kept.",
    )


def test_a_run_that_has_just_been_given_a_device_does_not_change_pools(run, alice):
    update_devices([DeviceReading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="second")
    admission.admit_runs()
    with raises_user_error(Conflict, code="device_given"):
        actions.change_pool(alice, run, Pool.objects.get(kind="H100"))


def test_a_device_of_a_run_that_is_over_is_given_back_whoever_forgot_it(run, make_run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.FAILED)
    second = make_run()
    assert admission.admit_runs() == [second.pk]


def test_the_api_tells_the_queue(run, make_run, as_alice):
    claim_run(run.pk)
    second = make_run()
    reasons.refresh_queue()
    [item] = as_alice.get("/api/v1/runs/queue").json()["items"]
    assert (item["id"], item["owner"], item["pool"], item["position"]) == (
        second.pk,
        "alice",
        "CPU",
        1,
    )
    assert "is in use" in item["reason"] and item["latest"] is None


def test_a_run_that_has_been_given_a_device_says_so_until_its_worker_comes(run, make_run, as_alice):
    second = make_run()
    assert admission.admit_runs() == [run.pk]
    reasons.refresh_queue()
    assert_mentions(as_alice.get(f"/runs/{run.pk}").content.decode(), Device.objects.get())
    assert_mentions(as_alice.get("/api/v1/runs/queue").content.decode(), Device.objects.get())
    page = as_alice.get("/gpus").content.decode()
    assert_mentions(page, Device.objects.get(), second.name)


def test_the_class_of_a_run_that_holds_a_device_is_an_admins_to_change(run, people):
    claim_run(run.pk)
    with raises_user_error(NotAllowed, code="device_held"):
        actions.change_priority(run.owner, run, "background")
    actions.change_priority(people["admin"], run, "background")
    assert Allocation.objects.get().priority == "background"


def test_forgiven_and_used_up_time_stand_in_the_audit_log(run, people):
    test_a_run_ends_when_it_has_held_devices_for_as_long_as_it_may(run)
    assert AuditEntry.objects.get(action="time used up").subject == f"run {run.pk}"
    admission.admit_runs()
    assert AuditEntry.objects.filter(action="time used up").count() == 1
    checks.check_time_limit(people["admin"], run)
    entry = AuditEntry.objects.get(action="time forgiven")
    assert (entry.actor, entry.before, round(entry.after["waived_seconds"] / 3600)) == (
        people["admin"],
        {"waived_seconds": 0.0},
        2,
    )


def test_who_may_hold_no_device_is_told_at_launch(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, max_running=0)
    with raises_user_error(code="person_has_no_device"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    PersonalQuota.objects.update(max_running=1)
    quota = Quota.objects.create(pool=Pool.objects.get(), team=run.team, limit=0)
    with raises_user_error(code="team_has_no_device", field="pool"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    Quota.objects.filter(pk=quota.pk).update(limit=1)
    launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def make_finished_run(make_run, device, *, steps, seconds):
    """A run of that many steps that held its device so long, and waited a day before."""
    now = timezone.now()
    finished_run = make_run(
        state=State.FINISHED, total_steps=steps, started_at=now - timedelta(days=1), finished_at=now
    )
    interval = {"started_at": now - timedelta(seconds=seconds), "released_at": now}
    Allocation.objects.create(
        device=device, run_id=finished_run.pk, user=finished_run.owner, reserved_bytes=1, **interval
    )


def test_a_waiting_run_should_take_as_long_as_its_steps_took_others_and_not_what_they_waited(
    run, make_run, device
):
    for steps, seconds in ((10, 20), (10, 30), (100, 200)):
        make_finished_run(make_run, device, steps=steps, seconds=seconds)
    typical_durations = durations.get_typical_durations()
    assert durations.expected_seconds(
        make_run(total_steps=1000), typical_durations
    ) == pytest.approx(2000, rel=0.01)
    assert durations.expected_seconds(
        make_run(total_steps=1000, step=900), typical_durations
    ) == pytest.approx(200, rel=0.01)
    assert durations.expected_seconds(make_run(), typical_durations) == pytest.approx(30, rel=0.01)
    assert (
        durations.expected_seconds(make_run(method="full", total_steps=10), typical_durations)
        == math.inf
    )


def test_the_steps_of_a_run_are_known_when_it_is_launched(
    alice, base_model, data, device, no_queue
):
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


def test_memory_in_use_by_others_is_not_promised_to_a_run(run, make_run, device):
    Run.objects.filter(pk=run.pk).update(forecast={"peak": device.total_bytes - GB})
    Device.objects.update(used_bytes=2 * GB)
    assert admission.admit_runs() == []
    reasons.refresh_queue()
    assert "programs that are no runs hold 2.0 GB" in get_queue_info(run)["reason"]
    Device.objects.update(used_bytes=GB // 2)
    assert admission.admit_runs() == [run.pk]
    Device.objects.update(used_bytes=device.total_bytes)
    assert (
        admission.build_pool_state(device.pool, [], timezone.now(), {}).devices[0].used_by_others
        == GB // 2
    ), "what its run uses is no stranger's"
