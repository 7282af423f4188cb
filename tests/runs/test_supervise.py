"""A worker supervises a real engine that trains a tiny model, and handles every way in which an
engine exits.
"""

import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from django.db import OperationalError

from adapters.models import AdapterVersion
from tests.runs.fake_engine import FakeEngine
from tests.runs.journals import Journal
from tests.runs.supervision import add_checkpoint, start_supervisor, wait_until
from tests.user_errors import assert_mentions
from training.engine.outcome import EXIT_CODES, Outcome, Result
from training.gpus.models import Allocation
from training.runs.actions import stop_run
from training.runs.models import Event, Run
from training.runs.states import RequestedAction, State
from training.runs.worker import engine_process, supervisor
from training.runs.worker.engine_process import EngineProcess
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import Lease, LeaseLost, claim_run
from training.runs.worker.supervisor import RunSupervisor, supervise_run


def test_a_queued_run_trains_and_its_adapter_is_registered(launched):
    run = launched()
    supervise_run(run.pk)
    run.refresh_from_db()
    assert run.state == State.FINISHED
    assert (run.step, run.total_steps, run.attempt) == (8, 8, 1)
    assert run.lease_token == ""
    numbers = list(Event.objects.filter(run=run).values_list("seq", flat=True))
    assert numbers == list(range(1, run.last_seq + 1))
    adapter = AdapterVersion.objects.get(run=run)
    assert (adapter.name, adapter.number, adapter.eval_loss) == ("Lamps", 1, run.eval_loss)
    assert sorted(path.name for path in adapter.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(run.folder.parent.parent) not in (adapter.folder / "adapter_config.json").read_text()
    supervise_run(run.pk)
    assert AdapterVersion.objects.count() == 1


def test_a_stopped_run_saves_its_adapter(launched):
    run = launched(max_steps=100_000)
    thread = start_supervisor(run)
    wait_until(lambda: Run.objects.get(pk=run.pk).step > 0)
    stop_run(run, discard=False)
    thread.join(60)
    run.refresh_from_db()
    assert run.state == State.STOPPED
    assert AdapterVersion.objects.get(run=run).step > 0


def test_shutdown_saves_a_checkpoint_and_queues_the_run_again(launched, monkeypatch):
    monkeypatch.setattr(supervisor, "shutting_down", threading.Event())
    run = launched(max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    thread = start_supervisor(run)
    wait_until(lambda: Run.objects.get(pk=run.pk).step > 0)
    supervisor.shutting_down.set()
    thread.join(60)
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert "Paused at step" in run.message
    assert run.crash_count == 0
    assert list((run.folder / "checkpoints").glob("step-*"))


def exited_supervisor(run, *, code, was_oom_killed=False, **changes):
    """A supervisor whose engine has exited with this code."""
    lease = claim_run(run.pk)
    Run.objects.filter(pk=run.pk).update(state=State.RUNNING, **changes)
    run_supervisor = RunSupervisor(lease)
    run_supervisor.engine = FakeEngine(code, was_oom_killed=was_oom_killed)
    return run_supervisor


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, "SIGKILL"),
        (-11, "SIGSEGV"),
        (70, "crashed"),
        (None, "no worker"),
    ],
)
def test_a_crash_queues_the_run_again_and_names_the_cause(run, code, message):
    exited_supervisor(run, code=code).handle_exit()
    run.refresh_from_db()
    assert run.state == State.QUEUED
    assert message in run.message
    assert (run.crash_count, run.lease_token) == (1, "")


@pytest.mark.django_db
def test_an_out_of_memory_kill_is_reported_and_recovered_from_at_once(run, monkeypatch):
    monkeypatch.setattr(
        supervisor.oom_recovery, "recover_run", lambda _run: "Half the rows at once."
    )
    exited_supervisor(run, code=-9, was_oom_killed=True).handle_exit()
    run.refresh_from_db()
    assert (
        "SIGKILL; its host ran out of memory" in run.message
        and "Half the rows at once." in run.message
    )


@pytest.mark.django_db
def test_a_run_paused_during_trials_does_not_mention_a_checkpoint(run):
    (run.folder / "trials").mkdir()
    exited_supervisor(run, code=EXIT_CODES[Outcome.PREEMPTED]).handle_exit()
    run.refresh_from_db()
    assert run.message.startswith("Paused during its trials")


@pytest.mark.django_db
@pytest.mark.parametrize(("has_checkpoint", "fact"), [(True, "with a"), (False, "without a")])
def test_a_paused_run_says_whether_it_has_a_checkpoint(run, has_checkpoint, fact):
    (run.folder / "checkpoints").mkdir()
    if has_checkpoint:
        add_checkpoint(run)
    exited_supervisor(run, code=EXIT_CODES[Outcome.PREEMPTED], step=4).handle_exit()
    run.refresh_from_db()
    assert_mentions(run.message, "step 4", f"{fact} checkpoint")


def test_the_engine_gets_its_allocator_settings_and_its_device(tmp_path):
    process = engine_process.EngineProcess(tmp_path)
    process.start_process({"CUDA_VISIBLE_DEVICES": "GPU-7"})
    environ_path = Path(f"/proc/{process.pid}/environ")
    # Between fork and exec it is still ours
    wait_until(lambda: b"HF_HUB_OFFLINE" in environ_path.read_bytes())
    assert {b"ONEDNN_PRIMITIVE_CACHE_CAPACITY=32", b"CUDA_VISIBLE_DEVICES=GPU-7"} <= set(
        environ_path.read_bytes().split(b"\0")
    )
    process.send_signal(signal.SIGKILL)


def test_a_kill_is_out_of_memory_only_if_linux_counted_one(tmp_path, monkeypatch):
    kill_counts = iter([3, 3, 3, 4])
    monkeypatch.setattr(engine_process, "count_oom_kills", lambda: next(kill_counts))
    for was_killed in (False, True):
        process = engine_process.EngineProcess(tmp_path)
        process.touch_heartbeat()
        process.start_process({})
        process.send_signal(signal.SIGKILL)
        wait_until(lambda process=process: not process.is_alive())
        assert process.was_oom_killed is was_killed


@pytest.mark.django_db
def test_too_many_crashes_without_a_checkpoint_are_a_crash_loop(run, settings):
    exited_supervisor(run, code=70, crash_count=settings.MAX_CRASHES).handle_exit()
    run.refresh_from_db()
    assert run.state == State.FAILED
    assert "4 times in a row" in run.message


@pytest.mark.django_db
@pytest.mark.parametrize(
    "outcome",
    [
        Outcome.DIVERGED,
        Outcome.OUT_OF_MEMORY,
        Outcome.DISK_FULL,
        Outcome.FAULT,
        Outcome.DATA_ERROR,
        Outcome.CONFIG_ERROR,
    ],
)
def test_a_failed_run_has_a_message_and_is_not_retried(run, outcome):
    run_supervisor = exited_supervisor(run, code=1)
    Result(outcome=outcome, message="It was too much.").write_file(run.folder)
    run_supervisor.handle_exit()
    run.refresh_from_db()
    assert (run.state, run.message) == (State.FAILED, "It was too much.")


@pytest.mark.django_db
def test_an_engine_without_room_for_a_result_is_a_full_disk_and_not_retried(run):
    exited_supervisor(run, code=EXIT_CODES[Outcome.DISK_FULL]).handle_exit()
    run.refresh_from_db()
    assert (run.state, run.failure, run.crash_count) == (State.FAILED, Outcome.DISK_FULL, 0)
    assert "full" in run.message


@pytest.mark.django_db
def test_an_engine_that_found_no_settings_is_not_started_again(run):
    (run.folder / "config.json").unlink()
    exited_supervisor(run, code=EXIT_CODES[Outcome.CONFIG_ERROR]).handle_exit()
    run.refresh_from_db()
    assert (run.state, run.failure) == (State.FAILED, Outcome.CONFIG_ERROR)
    assert_mentions(run.message, "config.json")


@pytest.mark.django_db
def test_a_damaged_result_of_a_config_error_does_not_blame_a_missing_file(run):
    (run.folder / "result.json").write_text("{")
    exited_supervisor(run, code=EXIT_CODES[Outcome.CONFIG_ERROR]).handle_exit()
    run.refresh_from_db()
    assert (run.state, run.crash_count) == (State.QUEUED, 1)  # the next engine writes it again
    assert "config.json" not in run.message


@pytest.mark.django_db
@pytest.mark.parametrize(
    "line", [b"\0" * 40, b'{"seq": 1, "time": 1, "kind": "step", "step": 1}', b"[]"]
)
def test_a_run_with_a_damaged_journal_fails_and_releases_its_device(run, line):
    run_supervisor = exited_supervisor(run, code=1)
    run_supervisor.engine = EngineProcess(run.folder)
    (run.folder / "events.jsonl").write_bytes(line + b"\n")
    Result(outcome=Outcome.FINISHED).write_file(run.folder)
    run_supervisor.run()
    run.refresh_from_db()
    assert (run.state, run.lease_token, run.last_seq) == (State.FAILED, "", 0)
    assert_mentions(run.message, "journal", "damaged")
    assert not Allocation.objects.filter(run_id=run.pk, released_at=None).exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("text", "fact"),
    [("database or disk is full", "full"), ("attempt to write a readonly database", "read-only")],
)
def test_a_full_disk_of_the_database_ends_the_run_as_a_full_disk(run, monkeypatch, text, fact):
    def fail(*_args):
        raise OperationalError(text)

    run_supervisor = exited_supervisor(run, code=1)
    Result(outcome=Outcome.FINISHED).write_file(run.folder)
    monkeypatch.setattr(run_supervisor, "ingest_journal", fail)
    run_supervisor.run()
    run.refresh_from_db()
    assert (run.state, run.failure, run.lease_token) == (State.FAILED, Outcome.DISK_FULL, "")
    assert_mentions(run.message, fact)


@pytest.mark.django_db
def test_a_worker_without_its_database_logs_why_it_stops(run, monkeypatch, caplog):
    def fail(*_args):
        raise OperationalError("connection refused")

    exited_supervisor(run, code=1)
    Run.objects.filter(pk=run.pk).update(state=State.STARTING, lease_expires_at=None)
    monkeypatch.setattr(supervisor, "claim_run", lambda run_id: Lease(run_id, "x"))
    monkeypatch.setattr(supervisor, "LEASE_SECONDS", 0)
    monkeypatch.setattr(RunSupervisor, "start_engine", lambda _self: None)
    monkeypatch.setattr(RunSupervisor, "ingest_journal", fail)
    with caplog.at_level("WARNING", "snapml.runs"):
        supervise_run(run.pk)
    assert_mentions(caplog.text, "did not respond")


@pytest.mark.django_db
def test_a_run_whose_folder_has_vanished_fails_instead_of_being_supervised_forever(run):
    run_supervisor = exited_supervisor(run, code=None)
    run_supervisor.engine = EngineProcess(run.folder)
    shutil.rmtree(run.folder)
    run_supervisor.run()
    run.refresh_from_db()
    assert (run.state, run.failure, run.lease_token) == (State.FAILED, Outcome.DISK_FULL, "")
    assert "vanished" in run.message


@pytest.mark.django_db
def test_an_adopted_engine_that_exited_cleanly_is_no_crash(run):
    run_supervisor = exited_supervisor(run, code=None, last_seq=1)
    Event.objects.create(run=run, seq=1, kind="end", time=1.0, fields={"outcome": "preempted"})
    run_supervisor.handle_exit()
    run.refresh_from_db()
    assert (run.state, run.crash_count) == (State.QUEUED, 0)
    assert "Paused" in run.message


@pytest.mark.django_db
@pytest.mark.parametrize("leftover", [(), ("checkpoints",), ("checkpoints", ".tmp-4-9")])
def test_a_stop_before_the_first_checkpoint_saves_nothing(run, leftover):
    run.folder.joinpath(*leftover).mkdir(parents=True, exist_ok=True)
    exited_supervisor(run, code=-9, requested_action=RequestedAction.STOP).handle_exit()
    run.refresh_from_db()
    assert run.state == State.STOPPED
    assert "nothing was saved" in run.message


@pytest.mark.django_db
def test_a_stop_whose_engine_crashed_is_completed_by_the_next_engine(run):
    add_checkpoint(run)
    exited_supervisor(run, code=-9, requested_action=RequestedAction.STOP).handle_exit()
    run.refresh_from_db()
    assert (run.state, run.requested_action) == (State.QUEUED, RequestedAction.STOP)


@pytest.mark.django_db
def test_a_worker_that_lost_its_lease_changes_no_files(run):
    run_supervisor = exited_supervisor(run, code=0)
    Result(outcome=Outcome.DISCARDED).write_file(run.folder)
    (run.folder / "checkpoints").mkdir()
    Run.objects.filter(pk=run.pk).update(lease_token="another")
    with pytest.raises(LeaseLost):
        run_supervisor.handle_exit()
    assert (run.folder / "checkpoints").exists()


@pytest.mark.django_db
def test_the_heartbeat_needs_a_valid_lease(run):
    run_supervisor = RunSupervisor(claim_run(run.pk))
    run_supervisor.lease = Lease(run.pk, "stale")
    with pytest.raises(LeaseLost):
        run_supervisor.renew_lease()
    assert not (run.folder / "heartbeat").exists()


@pytest.mark.django_db
def test_an_engine_that_ignores_a_stop_request_gets_signals(run):
    run_supervisor = exited_supervisor(run, code=None, requested_action=RequestedAction.STOP)
    # The engine counts its attempts on its own, and may have died before it counted one
    start = {"kind": "start", "attempt": 7, "total_steps": 9}
    record = run_supervisor.record
    store_events(run_supervisor.lease, record, Journal().lines(start), offset=1)
    run_supervisor.check_requests()
    run_supervisor.stop_requested_at = time.monotonic() - supervisor.STOP_TIMEOUT_SECONDS - 1
    run_supervisor.check_requests()
    run_supervisor.stop_requested_at = time.monotonic() - 2 * supervisor.STOP_TIMEOUT_SECONDS
    run_supervisor.check_requests()
    assert run_supervisor.engine.requests == ["save", signal.SIGTERM, signal.SIGKILL]


@pytest.mark.django_db
@pytest.mark.parametrize("action", [RequestedAction.STOP, RequestedAction.DISCARD])
def test_an_engine_that_hangs_before_its_first_step_is_killed_soon_after_a_stop(run, action):
    run_supervisor = exited_supervisor(run, code=None, requested_action=action)
    run_supervisor.check_requests()
    request = "discard" if action == RequestedAction.DISCARD else "save"
    assert run_supervisor.engine.requests == [request]
    run_supervisor.stop_requested_at = time.monotonic() - 15
    run_supervisor.check_requests()
    assert run_supervisor.engine.requests == [request, signal.SIGKILL]
