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
from tests.refusals import assert_mentions, raises_user_error
from tests.runs.fake_engine import FakeEngine
from training.errors import Conflict, NotAllowed, UserError
from training.gpus import allocations, quotas
from training.gpus.devices import Reading, report
from training.gpus.models import Allocation, AuditEntry, Device, Host, PersonalQuota, Pool, Quota
from training.people.models import Team
from training.runs.actions import continue_run, stop_run
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Event, Run
from training.runs.queue import actions, admission, checks, durations, reasons
from training.runs.states import State, RequestedAction
from training.runs.worker import outcomes
from training.runs.worker.lease import claim_run
from training.runs.worker.supervisor import RunSupervisor

pytestmark = pytest.mark.django_db
GB = 10**9


@pytest.fixture
def another(run):
    def make(**changes):
        made = Run.objects.get(pk=run.pk)
        made.pk = None
        fresh = {
            "queued_at": timezone.now(),
            "name": "another",
            "state": State.QUEUED,
            "queue_info": {},
            "step": 0,
            "total_steps": 0,
        }
        fresh |= {"lease_token": "", "lease_owner": "", "seconds_per_step": None}
        for name, value in (fresh | changes).items():
            setattr(made, name, value)
        made.save()
        made.folder.mkdir(parents=True, exist_ok=True)
        return made

    return make


def waits(run):
    return Run.objects.get(pk=run.pk).waits


def ended_watch(run, code=75):
    watch = RunSupervisor(claim_run(run.pk))
    watch.engine = FakeEngine(code)
    return watch


def test_an_admitted_run_holds_its_device_until_its_engine_is_gone(run, device):
    watch = ended_watch(run)
    held = Allocation.objects.get()
    assert (held.run_id, held.device, held.released_at, held.user) == (
        run.pk,
        device,
        None,
        run.owner,
    )
    watch.requeue_run("gone")
    held.refresh_from_db()
    assert held.released_at is not None


def test_the_database_itself_refuses_a_device_twice(run, another, device):
    holder = allocations.Holder(run.pk, run.name, run.owner, None, "normal", None)
    allocations.reserve(device, holder)
    with pytest.raises(IntegrityError), transaction.atomic():
        Allocation.objects.create(
            device=device,
            place=0,
            run_id=99,
            run_name="",
            user=run.owner,
            priority="normal",
            started_at=timezone.now(),
        )
    with pytest.raises(IntegrityError), transaction.atomic():
        Allocation.objects.create(
            device=device,
            place=1,
            run_id=run.pk,
            run_name="",
            user=run.owner,
            priority="normal",
            started_at=timezone.now(),
        )


def test_a_waiting_run_is_told_its_place_its_reason_and_when_it_should_start(run, another):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, step=10, total_steps=110, seconds_per_step=6.0
    )
    second, third = another(), another()
    reasons.look()
    now = timezone.now().timestamp()
    assert (waits(second)["place"], waits(third)["place"], waits(third)["of"]) == (1, 2, 2)
    assert "and the one device of CPU is in use" in waits(second)["reason"]
    assert 590 < waits(second)["earliest"] - now < 610
    assert 890 < waits(second)["latest"] - now < 910
    assert waits(third)["latest"] is None  # nobody knows yet how long such a run takes


def test_the_words_move_the_page_only_when_something_is_new(run, another):
    claim_run(run.pk)
    second = another()
    reasons.look()
    before = Run.objects.get(pk=second.pk).revision
    reasons.look()
    assert Run.objects.get(pk=second.pk).revision == before
    another(queued_at=timezone.now() - timedelta(days=1))
    reasons.look()
    assert Run.objects.get(pk=second.pk).revision == before + 1


def test_a_run_inside_its_guarantee_makes_a_borrowed_one_save_and_leave(run, another, people):
    others = Team.objects.get(name="others")
    Quota.objects.create(pool=Pool.objects.get(), team=others, guaranteed=1)
    watch = ended_watch(run)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=1))
    urgent = another(team=others, owner=people["mallory"])
    reasons.look()
    held = Allocation.objects.get(run_id=run.pk)
    assert held.evicted_for == urgent.pk
    assert Device.objects.get().kept_for == urgent.pk
    assert (
        waits(urgent)["reason"]
        == f"starts when run {run.pk} has saved its checkpoint and left its device."
    )
    watch.check_requests()
    assert watch.engine.requests == [signal.SIGTERM]
    Run.objects.filter(pk=run.pk).update(step=12)
    Event.objects.create(run=run, seq=1, kind="checkpoint", step=10, time=1.0, fields={})
    watch.handle_exit()
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert (
        f"Stopped for run {urgent.pk} at step 12; 2 steps since its checkpoint are trained again."
        in run.message
    )
    assert admission.admit() == [urgent.pk]
    assert {entry.act for entry in AuditEntry.objects.all()} == {"admitted", "preempted"}


def test_a_device_kept_for_a_run_that_is_cancelled_is_free_again(run, another, device):
    waiting = another()
    Device.objects.update(kept_for=waiting.pk)
    stop_run(waiting, discard=True)
    assert admission.admit() == [run.pk]


def test_a_run_without_a_forecast_has_its_device_alone(run, another):
    Pool.objects.update(runs_per_device=2)
    Run.objects.filter(pk=run.pk).update(forecast={})
    another(forecast={"peak": 1 * GB})
    assert admission.admit() == [run.pk]


def test_runs_of_a_host_that_is_gone_wait_again_and_go_on_elsewhere(run):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(
        state=State.RUNNING, lease_expires_at=timezone.now() - timedelta(seconds=1)
    )
    Host.objects.update(reported_at=timezone.now() - timedelta(minutes=5))
    assert admission.admit() == []
    run.refresh_from_db()
    assert run.state == State.QUEUED and "is gone" in run.message
    report([Reading(0, "other", "CPU, 8 cores", "CPU", 64 * GB, 0)], host="elsewhere")
    assert admission.admit() == [run.pk]
    assert Allocation.objects.get(released_at=None).device.host.name == "elsewhere"
    assert claim_run(run.pk) is None  # that is for a worker of the other host


def test_a_run_ends_when_it_has_held_devices_for_as_long_as_it_may(run):
    watch = ended_watch(run)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, longest_seconds=3600)
    Allocation.objects.update(started_at=timezone.now() - timedelta(hours=2))
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING)
    admission.admit()
    run.refresh_from_db()
    assert (run.state, run.requested_action) == (State.STOPPING, RequestedAction.TIME_LIMIT)
    assert "as long as its team's runs may" in outcomes.format_time_limit_message(run)
    watch.check_requests()
    assert watch.engine.requests == ["save"]


def test_hold_and_drain_stops_what_runs_with_a_checkpoint_and_hold_alone_does_not(
    run, another, people
):
    claim_run(run.pk)
    pool = Pool.objects.get()
    with pytest.raises(NotAllowed):
        quotas.hold(people["bob"], quotas.quota_of(pool, run.team), held=True)
    quotas.hold(people["admin"], quotas.quota_of(pool, run.team), held=True, reason="maintenance")
    assert Allocation.objects.get().evicted_at is None
    waiting = another()
    reasons.look()
    assert "is on hold" in waits(waiting)["reason"]
    quotas.hold(people["admin"], quotas.quota_of(pool, run.team), held=True, drain=True)
    assert Allocation.objects.get().evicted_at is not None
    Allocation.objects.update(released_at=timezone.now())
    quotas.hold(people["admin"], quotas.quota_of(pool, run.team), held=False)
    assert admission.admit() == [waiting.pk]


def test_what_can_never_run_is_refused_at_launch(
    alice, base_model, data, device, no_queue, monkeypatch
):
    monkeypatch.setattr("training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 30 * GB})
    with pytest.raises(
        UserError, match=r"needs 30.0 GB, and the largest device of CPU has 24.0 GB"
    ):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    monkeypatch.setattr("training.runs.launch.request.get_cached_forecast", lambda *_: {"peak": 20 * GB})
    Quota.objects.create(pool=Pool.objects.get(), team=data.dataset.team, most_bytes=10 * GB)
    with raises_user_error(code="most_memory", naming=("10.0 GB",)):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_nobody_queues_more_than_their_quota(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def test_urgent_is_granted_by_admins(run, people):
    with pytest.raises(NotAllowed):
        actions.change_class(run.owner, run, "urgent")
    actions.change_class(run.owner, run, "background")
    actions.change_class(people["admin"], run, "urgent", reason="demo at noon")
    run.refresh_from_db()
    assert run.priority == "urgent"
    assert AuditEntry.objects.filter(act="class", actor=people["admin"]).count() == 1


def test_owners_move_their_own_runs_up(run, another):
    second = another()
    actions.move_up(second)
    assert admission.admit() == [second.pk]


def test_a_stopped_run_that_goes_on_counts_in_the_queue_too(run, another, alice):
    stopped = another(state=State.STOPPED)
    PersonalQuota.objects.create(user=alice, queued=1)
    with raises_user_error(Conflict, code="queue_full"):
        continue_run(alice, stopped)


def test_an_admin_lets_a_run_go_on_that_has_used_its_time(run, people):
    claim_run(run.pk)
    Quota.objects.create(pool=Pool.objects.get(), team=run.team, longest_seconds=3600)
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
    admission.admit()
    assert Run.objects.get(pk=run.pk).state == State.RUNNING


def test_new_runs_do_not_wait_for_devices_that_are_long_gone(run):
    report([Reading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="retired")
    assert get_target_device().pool.kind == "H100"
    Host.objects.filter(name="retired").update(reported_at=timezone.now() - timedelta(days=30))
    assert get_target_device().pool.kind == "CPU"


def test_a_stop_while_it_makes_room_is_a_stop(run, another):
    watch = ended_watch(run)
    Allocation.objects.update(evicted_at=timezone.now())
    watch.check_requests()
    Run.objects.filter(pk=run.pk).update(requested_action=RequestedAction.STOP, state=State.STOPPING, step=5, last_seq=1)
    Event.objects.create(run=run, seq=1, kind="end", time=1.0, fields={"outcome": "preempted"})
    (run.folder / "checkpoints").mkdir()
    watch.handle_exit()
    run.refresh_from_db()
    assert (run.state, run.message) == (
        State.STOPPED,
        "Stopped after step 5; its checkpoint is kept.",
    )


def test_a_run_that_has_just_been_given_a_device_does_not_change_pools(run, alice):
    report([Reading(0, "GPU-9", "H100", "H100", 80 * GB, 0)], host="second")
    admission.admit()
    with raises_user_error(Conflict, code="device_given"):
        actions.change_pool(alice, run, Pool.objects.get(kind="H100"))


def test_a_device_of_a_run_that_is_over_is_given_back_whoever_forgot_it(run, another):
    claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.FAILED)
    second = another()
    assert admission.admit() == [second.pk]


def test_the_api_tells_the_queue(run, another, as_alice):
    claim_run(run.pk)
    second = another()
    reasons.look()
    [told] = as_alice.get("/api/v1/runs/queue").json()["items"]
    assert (told["id"], told["owner"], told["pool"], told["place"]) == (
        second.pk,
        "alice",
        "CPU",
        1,
    )
    assert "is in use" in told["reason"] and told["latest"] is None


def test_a_run_that_has_been_given_a_device_says_so_until_its_worker_comes(run, another, as_alice):
    second = another()
    assert admission.admit() == [run.pk]
    reasons.look()
    assert_mentions(as_alice.get(f"/runs/{run.pk}").content.decode(), Device.objects.get())
    assert_mentions(as_alice.get("/api/v1/runs/queue").content.decode(), Device.objects.get())
    page = as_alice.get("/gpus").content.decode()
    assert_mentions(page, Device.objects.get(), second.name)


def test_the_class_of_a_run_that_holds_a_device_is_an_admins_to_change(run, people):
    claim_run(run.pk)
    with raises_user_error(NotAllowed, code="device_held"):
        actions.change_class(run.owner, run, "background")
    actions.change_class(people["admin"], run, "background")
    assert Allocation.objects.get().priority == "background"


def test_forgiven_and_used_up_time_stand_in_the_audit_log(run, people):
    test_a_run_ends_when_it_has_held_devices_for_as_long_as_it_may(run)
    assert AuditEntry.objects.get(act="time used up").subject == f"run {run.pk}"
    admission.admit()
    assert AuditEntry.objects.filter(act="time used up").count() == 1
    checks.refuse_overdue(people["admin"], run)
    entry = AuditEntry.objects.get(act="time forgiven")
    assert (entry.actor, entry.before, round(entry.after["waived_seconds"] / 3600)) == (
        people["admin"],
        {"waived_seconds": 0.0},
        2,
    )


def test_who_may_hold_no_device_is_told_at_launch(run, alice, base_model, data):
    PersonalQuota.objects.create(user=alice, running=0)
    with raises_user_error(code="person_has_no_device"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    PersonalQuota.objects.update(running=1)
    quota = Quota.objects.create(pool=Pool.objects.get(), team=run.team, limit=0)
    with raises_user_error(code="team_has_no_device", field="pool"):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    Quota.objects.filter(pk=quota.pk).update(limit=1)
    launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)


def finished(another, device, *, steps, seconds):
    """A run of that many steps that held its device so long, and waited a day before."""
    now = timezone.now()
    done = another(
        state=State.FINISHED, total_steps=steps, started_at=now - timedelta(days=1), finished_at=now
    )
    held = {"started_at": now - timedelta(seconds=seconds), "released_at": now}
    Allocation.objects.create(
        device=device, run_id=done.pk, user=done.owner, reserved_bytes=1, **held
    )


def test_a_waiting_run_should_take_as_long_as_its_steps_took_others_and_not_what_they_waited(
    run, another, device
):
    for steps, seconds in ((10, 20), (10, 30), (100, 200)):
        finished(another, device, steps=steps, seconds=seconds)
    kinds = durations.usual_times()
    assert durations.expected_seconds(another(total_steps=1000), kinds) == pytest.approx(
        2000, rel=0.01
    )
    assert durations.expected_seconds(another(total_steps=1000, step=900), kinds) == pytest.approx(
        200, rel=0.01
    )
    assert durations.expected_seconds(another(), kinds) == pytest.approx(30, rel=0.01)
    assert durations.expected_seconds(another(method="full", total_steps=10), kinds) == math.inf


def test_the_steps_of_a_run_are_known_when_it_is_launched(alice, base_model, data, device, no_queue):
    from training.runs.forecast.token_lengths import get_lengths

    get_lengths(data, base_model)
    made = launch_run(
        alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "max_steps": 7}
    )
    assert made.total_steps == 7
    assert (
        launch_run(
            alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "max_steps": 0}
        ).total_steps
        > 0
    )


def test_memory_in_use_by_others_is_not_promised_to_a_run(run, another, device):
    Run.objects.filter(pk=run.pk).update(forecast={"peak": device.total_bytes - GB})
    Device.objects.update(used_bytes=2 * GB)
    assert admission.admit() == []
    reasons.look()
    assert "programs that are no runs hold 2.0 GB" in waits(run)["reason"]
    Device.objects.update(used_bytes=GB // 2)
    assert admission.admit() == [run.pk]
    Device.objects.update(used_bytes=device.total_bytes)
    assert admission.picture(device.pool, [], timezone.now(), {}).cards[0].taken == GB // 2, (
        "what its run uses is no stranger's"
    )
