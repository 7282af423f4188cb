"""Supervise one run: start its engine or take over a running one, store its journal, pass on
requests, and record how the run ended.

The engine does not depend on its supervisor. Every step here may be interrupted at any point, and
the next worker repeats it.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from datetime import timedelta

from django.conf import settings
from django.db import OperationalError, close_old_connections, transaction
from django.db.models import F
from django.db.models.functions import Now

from training.engine.events import JOURNAL_FILE, BrokenJournal, read_events
from training.engine.files import describe_storage_error
from training.engine.outcome import Outcome, Result, read_result
from training.errors import UserError, find_storage_error
from training.gpus import allocations
from training.gpus.models import Allocation
from training.runs.models import Run
from training.runs.notifications import notify_run_ended
from training.runs.queue import admission
from training.runs.run_files import list_checkpoint_steps
from training.runs.signals import run_changed
from training.runs.states import ENDED, RequestedAction, State
from training.runs.worker import oom_recovery, outcomes
from training.runs.worker.engine_process import Engine, EngineProcess
from training.runs.worker.exits import EngineExit, ExitAction, StopReason, classify_exit
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    Lease,
    LeaseLost,
    RateLimiter,
    claim_run,
)
from training.runs.worker.memory_guard import MemoryGuard, measure_context, raise_forecast
from training.text_input import clean_value

JOURNAL_POLL_SECONDS = 0.025
REQUEST_POLL_SECONDS = 0.25
MEMORY_CHECK_SECONDS = 2.0
# A stop request waits for the current step and a checkpoint before the engine gets SIGTERM
STOP_TIMEOUT_SECONDS = 120.0
KILL_TIMEOUT_SECONDS = 30.0  # from SIGTERM to SIGKILL
KILL_MARGIN_SECONDS = 5.0  # from SIGKILL to the end of the lease, when it cannot be renewed
# Before the first step there is nothing to save, and a template may loop forever.
SETUP_STOP_TIMEOUT_SECONDS = 8.0
MAX_RETRY_DELAY_SECONDS = 16
KILLED = "killed"

log = logging.getLogger("snapml.runs")
shutting_down = threading.Event()  # set by the worker program at shutdown


def supervise_run(run_id: int) -> None:
    """Supervise `run_id` until its engine exits, if this worker can claim it; otherwise return at
    once.
    """
    lease = None if shutting_down.is_set() else claim_run(run_id)
    if lease is None:
        return
    try:
        RunSupervisor(lease).run()
    except LeaseLost as error:
        log.warning("Supervision of run %s ends: %s.", run_id, error)
        return
    except Exception as error:
        log.exception("Supervision of run %s failed.", run_id)
        Run.objects.filter(pk=run_id, lease_token=lease.token).update(
            message=f"Supervision failed and restarts within {LEASE_SECONDS} s: "
            f"{type(error).__name__}: {error}",
            revision=F("revision") + 1,
        )
        return
    if not shutting_down.is_set():
        admission.run_admission_pass()


class RunSupervisor:
    """Supervises one run under one lease.

    A Huey thread of the worker creates it in `supervise_run` and calls `run`, which returns when
    the engine has exited and the run has ended or is queued again. `run` raises LeaseLost when
    another worker has taken over the run; the engine then continues under the new worker.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.record = Run.objects.get(pk=lease.run_id)
        self.engine: Engine = EngineProcess(self.record.folder)
        self.renewed_at = time.monotonic()
        self.stop_requested_at: float | None = None
        self.last_sent_request = RequestedAction.RUN
        self.has_sent_sigterm = False
        self.eviction: Allocation | None = None
        self.memory_guard = MemoryGuard(lease.run_id)
        self.usage_over_limit = 0  # memory use on a shared device, if it is above the limit

    def run(self) -> None:
        try:
            self.follow_engine()
        except (OSError, OperationalError) as error:
            message = describe_storage_error(error, self.record.folder)
            if message is None:
                raise
            # The engine has no heartbeat any more. Another run may get the device only when it is
            # dead. Its own disk may have room for a checkpoint, if the database is on another one.
            lease_seconds = LEASE_SECONDS - (time.monotonic() - self.renewed_at)
            self.engine.send_signal(signal.SIGTERM)
            if not self.wait_for_exit(lease_seconds - KILL_MARGIN_SECONDS):
                self.engine.send_signal(signal.SIGKILL)
                if not self.wait_for_exit(KILL_MARGIN_SECONDS):
                    raise
            self.release_run(
                state=State.FAILED,
                failure=Outcome.DISK_FULL,
                message=f"Stopped at step {self.record.step:,}. {message}",
                finished_at=Now(),
                phase="",
            )

    def wait_for_exit(self, seconds: float) -> bool:
        """Whether the engine has exited within this time."""
        deadline = time.monotonic() + seconds
        while self.engine.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(JOURNAL_POLL_SECONDS)
        return True

    def follow_engine(self) -> None:
        """Start the engine or take it over, and follow it until it has exited."""
        self.engine.touch_heartbeat()
        if not self.engine.is_alive() and read_result(self.record.folder) is None:
            self.start_engine()
        lease_timer = RateLimiter(RENEW_SECONDS)
        request_timer = RateLimiter(REQUEST_POLL_SECONDS)
        memory_timer = RateLimiter(MEMORY_CHECK_SECONDS)
        has_events = False
        while True:
            try:
                # Check the process before reading the journal: then everything that the engine
                # wrote before its exit is read below.
                is_alive = self.engine.is_alive()
                has_events = self.ingest_journal()

                # Renew the lease and, if that worked, the engine's heartbeat.
                if lease_timer.is_due():
                    self.renew_lease()

                # Compare the engine's memory with its reservation.
                if memory_timer.is_due():
                    if not self.usage_over_limit:
                        self.usage_over_limit = self.memory_guard.get_over_limit_bytes(
                            self.engine.pid
                        )
                    measure_context(self.memory_guard.allocation, self.engine.pid)

                # Pass on stop requests, evictions and the shutdown of this worker.
                if request_timer.is_due():
                    self.check_requests()

                # The engine has exited and its whole journal is stored.
                if not is_alive and not has_events:
                    return self.handle_exit()
            except OperationalError as error:
                self.wait_for_database(error)
            except BrokenJournal as error:
                # The journal is damaged, so no further event can be stored: end the run. Another
                # run may get the device only when the engine is dead.
                log.warning("Run %s ends.", self.lease.run_id, exc_info=error)
                self.engine.send_signal(signal.SIGKILL)
                if not self.engine.is_alive():
                    return self.release_run(
                        state=State.FAILED, message=str(error), finished_at=Now(), phase=""
                    )
                has_events = False
            # While there are events, read on without a pause.
            if not has_events:
                time.sleep(JOURNAL_POLL_SECONDS)

    def start_engine(self) -> None:
        self.lease.update_run(
            attempt=F("attempt") + 1, started_at=self.record.started_at or Now(), message=""
        )
        self.engine.start_process(self.memory_guard.build_device_environment())

    def ingest_journal(self) -> bool:
        """Store the events that the journal has and the database does not; returns whether there
        were any.
        """
        journal = self.record.folder / JOURNAL_FILE
        if not journal.exists():
            return False
        new_events = list(read_events(journal, self.record.journal_offset))
        if not new_events:
            return False
        store_events(self.lease, self.record, [event for event, _ in new_events], new_events[-1][1])
        run_changed.send(Run, run_id=self.record.pk)
        return True

    def renew_lease(self) -> None:
        """Renew the lease, then the engine's heartbeat. In this order, a worker that cannot reach
        the database lets its engine time out.
        """
        self.lease.renew()
        self.renewed_at = time.monotonic()
        self.engine.touch_heartbeat()

    def check_requests(self) -> None:
        """Check for stop requests, evictions and worker shutdown, and pass them to the engine."""
        requested_action = RequestedAction(
            Run.objects.values_list("requested_action", flat=True).get(pk=self.record.pk)
        )
        self.eviction = self.eviction or allocations.get_pending_eviction(self.record.pk)
        if shutting_down.is_set() or self.eviction or self.usage_over_limit:
            self.request_checkpoint_and_exit()
        if (
            requested_action == RequestedAction.RUN
            and not self.eviction
            and not self.usage_over_limit
        ):
            return
        self.stop_requested_at = self.stop_requested_at or time.monotonic()
        if requested_action != self.last_sent_request:
            self.lease.renew()  # only the holder of the lease may control the engine
            self.last_sent_request = requested_action
            self.engine.request_stop(
                "discard" if requested_action == RequestedAction.DISCARD else "save"
            )
        waited = time.monotonic() - self.stop_requested_at
        if (
            requested_action in (RequestedAction.STOP, RequestedAction.DISCARD)
            and (waited > SETUP_STOP_TIMEOUT_SECONDS and not self.has_progress())
        ) or waited > STOP_TIMEOUT_SECONDS + KILL_TIMEOUT_SECONDS:
            self.engine.send_signal(signal.SIGKILL)
        elif waited > STOP_TIMEOUT_SECONDS:
            self.request_checkpoint_and_exit()

    def has_progress(self) -> bool:
        """Whether an engine of this run has ever started to train, so that its data and templates
        can be read.
        """
        return bool(self.record.start_info)

    def request_checkpoint_and_exit(self) -> None:
        """Send SIGTERM once: the engine saves a checkpoint after its current step and exits, to be
        resumed later.
        """
        if not self.has_sent_sigterm:
            self.engine.send_signal(signal.SIGTERM)
            self.has_sent_sigterm = True

    def wait_for_database(self, error: OperationalError) -> None:
        """Raises the error again if the database's disk is full: waiting does not help. Raises
        LeaseLost if the lease has expired.
        """
        if find_storage_error(error):
            raise error
        if time.monotonic() - self.renewed_at > LEASE_SECONDS:
            raise LeaseLost(f"the database did not respond for {LEASE_SECONDS} s") from error
        log.warning(
            "Run %s: the database does not respond (%s). Trying again.", self.lease.run_id, error
        )
        close_old_connections()
        time.sleep(0.5)

    def handle_exit(self) -> None:
        """The engine has exited and its journal is stored: end the run or queue it again."""
        run = Run.objects.select_related("base_model", "data__dataset").get(pk=self.record.pk)
        result = read_result(run.folder)
        engine_exit = EngineExit(
            reasons=self.get_stop_reasons(run),
            has_config=(run.folder / "config.json").is_file(),
            has_result=result is not None,
            has_checkpoint=bool(list_checkpoint_steps(run)),
            exited_cleanly=outcomes.has_exited_cleanly(run),
            exit_code=self.engine.exit_code,
        )
        match classify_exit(engine_exit):
            case ExitAction.RESULT:
                assert result is not None
                self.record_result(run, result)
            case action if action in outcomes.RESULT_BUILDERS:
                self.record_result(run, outcomes.RESULT_BUILDERS[action](run))
            case ExitAction.EVICTED:
                assert self.eviction is not None
                self.requeue_run(outcomes.format_eviction_message(run, self.eviction))
            case ExitAction.OVER_MEMORY:
                self.requeue_with_more_memory(run)
            case ExitAction.PAUSED:
                self.requeue_run(outcomes.format_pause_message(run))
            case ExitAction.PAUSED_EARLY:
                self.requeue_run("Paused before the first step. It restarts automatically.")
            case ExitAction.FOLDER_BUSY:
                self.requeue_run("Another engine is using the folder of this run. Trying again.")
            case ExitAction.CRASHED:
                self.requeue_after_crash(run, self.engine.exit_code)

    def get_stop_reasons(self, run: Run) -> frozenset[StopReason]:
        reasons = {
            StopReason.DISCARD: run.requested_action == RequestedAction.DISCARD,
            StopReason.STOP: run.requested_action
            in (RequestedAction.STOP, RequestedAction.TIME_LIMIT),
            StopReason.EVICTION: self.eviction is not None,
            StopReason.OVER_MEMORY: self.usage_over_limit > 0,
            StopReason.SIGTERM: self.has_sent_sigterm,
        }
        return frozenset(reason for reason, applies in reasons.items() if applies)

    def record_result(self, run: Run, result: Result) -> None:
        """Save the artifacts of a run and end it. A run that is out of memory is queued again if
        its settings can be changed automatically.
        """
        state = outcomes.OUTCOME_STATES[result.outcome]
        # A worker that was suspended for a while loses its lease here, before it changes a file.
        self.lease.renew()
        eval_loss = (
            result.eval_loss
            if result.eval_loss is not None and math.isfinite(result.eval_loss)
            else run.eval_loss
        )
        try:
            outcomes.finalize_run(run, result)
        except (UserError, OSError) as error:
            state = State.FAILED
            storage_message = describe_storage_error(error, run.folder)
            result = Result(
                outcome=Outcome.DISK_FULL if storage_message else Outcome.CRASHED,
                message=f"The adapter could not be saved: {storage_message or error}",
            )
        if (
            result.outcome is Outcome.OUT_OF_MEMORY
            and run.requested_action == RequestedAction.RUN
            and (changes_message := oom_recovery.recover_run(run))
        ):
            return self.requeue_run(f"{result.message} {changes_message}", crash_count=0)
        self.release_run(
            state=state,
            failure=result.outcome if state == State.FAILED else "",
            message=outcomes.format_time_limit_message(run, result)
            if run.requested_action == RequestedAction.TIME_LIMIT and state == State.STOPPED
            else result.message,
            finished_at=Now(),
            eval_loss=eval_loss,
            phase="",
        )

    def requeue_with_more_memory(self, run: Run) -> None:
        """Queue a run again that used more memory than it had reserved, with a higher forecast; it
        fails if its pool never allows as much.
        """
        message = outcomes.format_over_memory_message(run, self.usage_over_limit)
        forecast = raise_forecast(run, self.usage_over_limit)
        if forecast is None:
            message += " No device of its pool allows as much."
            return self.record_result(run, Result(outcome=Outcome.OUT_OF_MEMORY, message=message))
        self.requeue_run(
            f"{message} It resumes on a device with enough free memory.", forecast=forecast
        )

    def requeue_after_crash(self, run: Run, code: int | None) -> None:
        """Resume from the last checkpoint after 1, 2, 4... seconds. After MAX_CRASHES without a new
        checkpoint the run fails as a crash loop.
        """
        message = outcomes.format_crash_message(code, was_oom_killed=self.engine.was_oom_killed)
        crash_count = run.crash_count + 1
        if crash_count > settings.MAX_CRASHES:
            message += (
                f" {crash_count} times in a row without a new checkpoint, most recently at step "
                f"{run.step}. {outcomes.get_last_error(run)}"
            )
            failure = KILLED if code == -signal.SIGKILL else Outcome.CRASHED
            return self.release_run(
                state=State.FAILED, failure=failure, message=message, finished_at=Now(), phase=""
            )
        is_out_of_memory = self.engine.was_oom_killed or (
            crash_count > 1 and code == -signal.SIGKILL
        )
        can_recover = is_out_of_memory and run.requested_action == RequestedAction.RUN
        changes_message = oom_recovery.recover_run(run) if can_recover else ""
        # No delay after the first crash
        seconds = min(MAX_RETRY_DELAY_SECONDS, 2 ** (crash_count - 1)) if crash_count > 1 else 0
        resume_message = changes_message or "Resuming from the last checkpoint."
        self.requeue_run(
            f"{message} at step {run.step}. {resume_message}",
            crash_count=crash_count,
            not_before=Now() + timedelta(seconds=seconds),
        )

    def requeue_run(self, message: str, **changes: object) -> None:
        self.release_run(state=State.QUEUED, message=message, phase="", **changes)

    def release_run(self, **changes: object) -> None:
        changes |= {
            "lease_token": "",
            "lease_owner": "",
            "lease_expires_at": None,
            "revision": F("revision") + 1,
        }
        changes = clean_value(changes)  # the message may quote the engine
        # One transaction with the update under the lease: webhooks are notified exactly once
        with transaction.atomic():
            self.lease.update_run(**changes)
            allocations.release_device(self.lease.run_id)
            if changes.get("state") in ENDED:
                notify_run_ended(self.lease.run_id)
                Run.objects.get(pk=self.lease.run_id).update_disk_bytes()
        run_changed.send(Run, run_id=self.lease.run_id)
