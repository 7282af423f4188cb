"""Watch one run: start its engine or take over a living one, turn its journal into rows, and say
truly how it ended.

The engine does not need this watcher to go on. Everything here may die at any point and be done
again by the next worker.
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

from training.engine.events import JOURNAL_FILE, read_events
from training.engine.outcome import EXIT_CODES, Outcome, Result, read_result
from training.errors import UserError
from training.gpus import allocations
from training.gpus.models import Allocation
from training.runs.models import Run
from training.runs.notifications import notify_run_ended
from training.runs.queue import admission
from training.runs.signals import run_changed
from training.runs.states import ENDED, RequestedAction, State
from training.runs.worker import oom_recovery, outcomes
from training.runs.worker.engine_process import Engine, EngineProcess
from training.runs.worker.ingest import BrokenJournal, store_events
from training.runs.worker.lease import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    Lease,
    LeaseLost,
    RateLimiter,
    claim_run,
)
from training.runs.worker.memory_guard import MemoryGuard, measure_context, raise_forecast

JOURNAL_POLL_SECONDS = 0.025
REQUEST_POLL_SECONDS = 0.25
MEMORY_CHECK_SECONDS = 2.0
# A stop waits for the step under way and a checkpoint, then the engine is told by signal
STOP_TIMEOUT_SECONDS = 120.0
KILL_TIMEOUT_SECONDS = 30.0
MAX_RETRY_DELAY_SECONDS = 16
KILLED = "killed"

log = logging.getLogger("snapml.runs")
shutting_down = threading.Event()  # set by the worker program when it is told to end


def supervise_run(run_id: int) -> None:
    """Watch `run_id` to its end, if this worker can claim it. A doorbell too many finds nothing to
    claim.
    """
    lease = None if shutting_down.is_set() else claim_run(run_id)
    if lease is None:
        return
    try:
        RunSupervisor(lease).run()
    except LeaseLost:
        log.warning("Run %s is watched by another worker now; this one lets go.", run_id)
        return
    except Exception as error:
        log.exception("Watching run %s broke off.", run_id)
        Run.objects.filter(pk=run_id, lease_token=lease.token).update(
            message=f"Watching broke off and begins again within {LEASE_SECONDS} s: "
            f"{type(error).__name__}: {error}",
            revision=F("revision") + 1,
        )
        return
    if not shutting_down.is_set():
        admission.run_admission_pass()


class RunSupervisor:
    """The watching of one run under one lease."""

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
        self.over_limit_bytes = (
            0  # bytes that it took of a device that others use, if that was too much
        )

    def run(self) -> None:
        self.engine.touch_heartbeat()
        if not self.engine.is_alive() and read_result(self.record.folder) is None:
            self.start_engine()
        lease_timer, request_timer, memory_timer = (
            RateLimiter(RENEW_SECONDS),
            RateLimiter(REQUEST_POLL_SECONDS),
            RateLimiter(MEMORY_CHECK_SECONDS),
        )
        while True:
            try:
                # Asked before reading: what it wrote until its death is then surely read
                is_alive = self.engine.is_alive()
                has_events = self.ingest_journal()
                if lease_timer.is_due():
                    self.renew_lease()
                if memory_timer.is_due():
                    self.over_limit_bytes = (
                        self.over_limit_bytes
                        or self.memory_guard.get_over_limit_bytes(self.engine.pid)
                    )
                    measure_context(self.memory_guard.allocation, self.engine.pid)
                if request_timer.is_due():
                    self.check_requests()
                if not is_alive and not has_events:
                    return self.handle_exit()
            except OperationalError as error:
                self.wait_for_database(error)
            except BrokenJournal as error:
                self.engine.send_signal(signal.SIGKILL)
                if not self.engine.is_alive():  # only then may another have its device
                    return self.release_run(
                        state=State.FAILED, message=str(error), finished_at=Now(), phase=""
                    )
                has_events = False
            if not has_events:
                time.sleep(JOURNAL_POLL_SECONDS)

    def start_engine(self) -> None:
        self.lease.update_run(
            attempt=F("attempt") + 1, started_at=self.record.started_at or Now(), message=""
        )
        self.engine.start_process(self.memory_guard.device_environment())

    def ingest_journal(self) -> bool:
        """Store what the journal has that the database has not; whether there was anything."""
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
        """The leash is touched only after the lease was renewed: a worker cut off from the database
        lets the engine go.
        """
        self.lease.renew()
        self.renewed_at = time.monotonic()
        self.engine.touch_heartbeat()

    def check_requests(self) -> None:
        """What its people want of it, whether its device is wanted back, and whether this worker is
        to end.
        """
        requested_action = RequestedAction(
            Run.objects.values_list("requested_action", flat=True).get(pk=self.record.pk)
        )
        self.eviction = self.eviction or allocations.get_pending_eviction(self.record.pk)
        if shutting_down.is_set() or self.eviction or self.over_limit_bytes:
            self.request_checkpoint_and_exit()
        if (
            requested_action == RequestedAction.RUN
            and not self.eviction
            and not self.over_limit_bytes
        ):
            return
        self.stop_requested_at = self.stop_requested_at or time.monotonic()
        if requested_action != self.last_sent_request:
            self.lease.renew()  # only who holds the run may tell its engine
            self.last_sent_request = requested_action
            self.engine.request_stop(
                "discard" if requested_action == RequestedAction.DISCARD else "save"
            )
        waited = time.monotonic() - self.stop_requested_at
        if waited > STOP_TIMEOUT_SECONDS + KILL_TIMEOUT_SECONDS:
            self.engine.send_signal(signal.SIGKILL)
        elif waited > STOP_TIMEOUT_SECONDS:
            self.request_checkpoint_and_exit()

    def request_checkpoint_and_exit(self) -> None:
        """It saves a checkpoint at its next step and leaves, to go on later."""
        if not self.has_sent_sigterm:
            self.engine.send_signal(signal.SIGTERM)
            self.has_sent_sigterm = True

    def wait_for_database(self, error: OperationalError) -> None:
        if time.monotonic() - self.renewed_at > LEASE_SECONDS:
            raise LeaseLost(f"the database did not answer for {LEASE_SECONDS} s") from error
        log.warning(
            "Run %s: the database does not answer (%s); trying again.", self.lease.run_id, error
        )
        close_old_connections()
        time.sleep(0.5)

    def handle_exit(self) -> None:
        """The engine is gone and its journal is read: say how it ended, or queue it again."""
        run = Run.objects.select_related("base_model", "data__dataset").get(pk=self.record.pk)
        result = read_result(run.folder)
        code = self.engine.exit_code
        has_checkpoint = (run.folder / "checkpoints").exists()
        if result is not None:
            self.record_result(run, result)
        elif run.requested_action == RequestedAction.DISCARD:
            self.record_result(run, Result(outcome=Outcome.DISCARDED))
        elif (
            run.requested_action in (RequestedAction.STOP, RequestedAction.TIME_LIMIT)
            and not has_checkpoint
        ):
            self.record_result(
                run,
                Result(
                    outcome=Outcome.STOPPED,
                    message="Stopped before the first checkpoint; nothing was kept.",
                ),
            )
        # Told to leave and to stop at once
        elif run.requested_action in (
            RequestedAction.STOP,
            RequestedAction.TIME_LIMIT,
        ) and outcomes.has_exited_cleanly(run):
            self.record_result(run, outcomes.build_stopped_result(run))
        elif self.eviction is not None:
            self.requeue_run(outcomes.format_eviction_message(run, self.eviction))
        elif self.over_limit_bytes:
            message, forecast = (
                outcomes.format_over_memory_message(run, self.over_limit_bytes),
                raise_forecast(run, self.over_limit_bytes),
            )
            if forecast is None:
                return self.record_result(
                    run,
                    Result(
                        outcome=Outcome.MEMORY,
                        message=f"{message} Nowhere may it have as much in its pool.",
                    ),
                )
            self.requeue_run(
                f"{message} Goes on by itself where there is as much.", forecast=forecast
            )
        elif code == EXIT_CODES[Outcome.PREEMPTED] or outcomes.has_exited_cleanly(run):
            self.requeue_run(outcomes.format_pause_message(run))
        elif self.has_sent_sigterm and code == -signal.SIGTERM:
            self.requeue_run("Paused before its first step; begins by itself.")
        elif code == EXIT_CODES[Outcome.BUSY]:
            self.requeue_run("Another engine held this run's folder.")
        else:
            self.requeue_after_crash(run, code)

    def record_result(self, run: Run, result: Result) -> None:
        state = outcomes.OUTCOME_STATES[result.outcome]
        # a worker that was frozen and thawed finds out here, before it touches a file
        self.lease.renew()
        eval_loss = (
            result.eval_loss
            if result.eval_loss is not None and math.isfinite(result.eval_loss)
            else run.eval_loss
        )
        try:
            outcomes.finalize_run(run, result)
        except (UserError, OSError) as error:
            state, result = (
                State.FAILED,
                Result(outcome=Outcome.CRASHED, message=f"The adapter was not kept: {error}"),
            )
        if (
            result.outcome is Outcome.MEMORY
            and run.requested_action == RequestedAction.RUN
            and (changes_message := oom_recovery.recover_run(run))
        ):
            return self.requeue_run(f"{result.message} {changes_message}", crash_count=0)
        self.release_run(
            state=state,
            failure=result.outcome if state == State.FAILED else "",
            message=outcomes.format_time_limit_message(run)
            if run.requested_action == RequestedAction.TIME_LIMIT and state == State.STOPPED
            else result.message,
            finished_at=Now(),
            eval_loss=eval_loss,
            phase="",
        )

    def requeue_after_crash(self, run: Run, code: int | None) -> None:
        """Once more from the last checkpoint, after 1, 2, 4... seconds; MAX_CRASHES without progress
        are a crash loop.
        """
        message, crash_count = (
            outcomes.format_crash_message(code, was_oom_killed=self.engine.was_oom_killed),
            run.crash_count + 1,
        )
        if crash_count > settings.MAX_CRASHES:
            message += (
                f" {crash_count} times in a row without a new checkpoint, last at step "
                f"{run.step}. {outcomes.get_last_error(run)}"
            )
            failure = KILLED if code == -signal.SIGKILL else Outcome.CRASHED
            return self.release_run(
                state=State.FAILED, failure=failure, message=message, finished_at=Now(), phase=""
            )
        is_out_of_memory = self.engine.was_oom_killed or (
            crash_count > 1 and code == -signal.SIGKILL
        )
        changes_message = (
            oom_recovery.recover_run(run)
            if is_out_of_memory and run.requested_action == RequestedAction.RUN
            else ""
        )
        delay = (
            timedelta(seconds=min(MAX_RETRY_DELAY_SECONDS, 2 ** (crash_count - 1)))
            if crash_count > 1
            else timedelta()
        )
        self.requeue_run(
            f"{message} at step {run.step}; going on from its last checkpoint. {changes_message}".strip(),
            crash_count=crash_count,
            not_before=Now() + delay,
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
        # The message to the owner's webhooks is left exactly once, with the fenced change
        with transaction.atomic():
            self.lease.update_run(**changes)
            allocations.release_device(self.lease.run_id)
            if changes.get("state") in ENDED:
                notify_run_ended(self.lease.run_id)
        run_changed.send(Run, run_id=self.lease.run_id)
