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
from training.runs.notifications import tell_of_end
from training.runs.queue import admission
from training.runs.signals import run_changed
from training.runs.states import ENDED, State, Wish
from training.runs.worker import oom_recovery, outcomes
from training.runs.worker.engine_process import Engine, EngineProcess
from training.runs.worker.ingest import BrokenJournal, store
from training.runs.worker.lease import LEASE_SECONDS, RENEW_SECONDS, Every, Lease, LeaseLost, claim
from training.runs.worker.memory_guard import Share, measure_context, raised

TAIL_SECONDS = 0.025
LOOK_SECONDS = 0.25
SHARE_SECONDS = 2.0
# A stop waits for the step under way and a checkpoint, then the engine is told by signal
STOP_PATIENCE_SECONDS = 120.0
KILL_PATIENCE_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 16
KILLED = "killed"

log = logging.getLogger("snapml.runs")
shutting_down = threading.Event()  # set by the worker program when it is told to end


def supervise_run(run_id: int) -> None:
    """Watch `run_id` to its end, if this worker can claim it. A doorbell too many finds nothing to
    claim.
    """
    lease = None if shutting_down.is_set() else claim(run_id)
    if lease is None:
        return
    try:
        Watch(lease).run()
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
        admission.look_once()


class Watch:
    """The watching of one run under one lease."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.record = Run.objects.get(pk=lease.run_id)
        self.engine: Engine = EngineProcess(self.record.folder)
        self.renewed_at = time.monotonic()
        self.stop_asked_at: float | None = None
        self.told = Wish.RUN
        self.signalled = False
        self.evicted: Allocation | None = None
        self.share = Share(lease.run_id)
        self.greedy = 0  # bytes that it took of a device that others use, if that was too much

    def run(self) -> None:
        self.engine.touch_leash()
        if not self.engine.alive() and read_result(self.record.folder) is None:
            self.start()
        renew, look, watch = Every(RENEW_SECONDS), Every(LOOK_SECONDS), Every(SHARE_SECONDS)
        while True:
            try:
                # Asked before reading: what it wrote until its death is then surely read
                alive = self.engine.alive()
                moved = self.tail()
                if renew.due():
                    self.renew()
                if watch.due():
                    self.greedy = self.greedy or self.share.exceeded(self.engine.pid)
                    measure_context(self.share.held, self.engine.pid)
                if look.due():
                    self.look()
                if not alive and not moved:
                    return self.end()
            except OperationalError as error:
                self.wait_for_database(error)
            except BrokenJournal as error:
                self.engine.signal(signal.SIGKILL)
                if not self.engine.alive():  # only then may another have its device
                    return self.release(
                        state=State.FAILED, message=str(error), finished_at=Now(), phase=""
                    )
                moved = False
            if not moved:
                time.sleep(TAIL_SECONDS)

    def start(self) -> None:
        self.lease.update(
            attempt=F("attempt") + 1, started_at=self.record.started_at or Now(), message=""
        )
        self.engine.start(self.share.variables())

    def tail(self) -> bool:
        """Store what the journal has that the database has not; whether there was anything."""
        journal = self.record.folder / JOURNAL_FILE
        if not journal.exists():
            return False
        read = list(read_events(journal, self.record.journal_offset))
        if not read:
            return False
        store(self.lease, self.record, [event for event, _ in read], read[-1][1])
        run_changed.send(Run, run_id=self.record.pk)
        return True

    def renew(self) -> None:
        """The leash is touched only after the lease was renewed: a worker cut off from the database
        lets the engine go.
        """
        self.lease.renew()
        self.renewed_at = time.monotonic()
        self.engine.touch_leash()

    def look(self) -> None:
        """What its people want of it, whether its device is wanted back, and whether this worker is
        to end.
        """
        wish = Wish(Run.objects.values_list("wish", flat=True).get(pk=self.record.pk))
        self.evicted = self.evicted or allocations.evicted(self.record.pk)
        if shutting_down.is_set() or self.evicted or self.greedy:
            self.ask_to_leave()
        if wish == Wish.RUN and not self.evicted and not self.greedy:
            return
        self.stop_asked_at = self.stop_asked_at or time.monotonic()
        if wish != self.told:
            self.lease.renew()  # only who holds the run may tell its engine
            self.told = wish
            self.engine.ask_to_stop("discard" if wish == Wish.DISCARD else "save")
        waited = time.monotonic() - self.stop_asked_at
        if waited > STOP_PATIENCE_SECONDS + KILL_PATIENCE_SECONDS:
            self.engine.signal(signal.SIGKILL)
        elif waited > STOP_PATIENCE_SECONDS:
            self.ask_to_leave()

    def ask_to_leave(self) -> None:
        """It saves a checkpoint at its next step and leaves, to go on later."""
        if not self.signalled:
            self.engine.signal(signal.SIGTERM)
            self.signalled = True

    def wait_for_database(self, error: OperationalError) -> None:
        if time.monotonic() - self.renewed_at > LEASE_SECONDS:
            raise LeaseLost(f"the database did not answer for {LEASE_SECONDS} s") from error
        log.warning(
            "Run %s: the database does not answer (%s); trying again.", self.lease.run_id, error
        )
        close_old_connections()
        time.sleep(0.5)

    def end(self) -> None:
        """The engine is gone and its journal is read: say how it ended, or queue it again."""
        run = Run.objects.select_related("base_model", "data__dataset").get(pk=self.record.pk)
        result = read_result(run.folder)
        code = self.engine.exit_code
        has_checkpoint = (run.folder / "checkpoints").exists()
        if result is not None:
            self.conclude(run, result)
        elif run.wish == Wish.DISCARD:
            self.conclude(run, Result(outcome=Outcome.DISCARDED))
        elif run.wish in (Wish.STOP, Wish.TIME) and not has_checkpoint:
            self.conclude(
                run,
                Result(
                    outcome=Outcome.STOPPED,
                    message="Stopped before the first checkpoint; nothing was kept.",
                ),
            )
        # Told to leave and to stop at once
        elif run.wish in (Wish.STOP, Wish.TIME) and outcomes.left_by_its_own_word(run):
            self.conclude(run, outcomes.stopped_with_checkpoint(run))
        elif self.evicted is not None:
            self.requeue(outcomes.words_of_eviction(run, self.evicted))
        elif self.greedy:
            words, forecast = outcomes.words_of_greed(run, self.greedy), raised(run, self.greedy)
            if forecast is None:
                return self.conclude(
                    run,
                    Result(
                        outcome=Outcome.MEMORY,
                        message=f"{words} Nowhere may it have as much in its pool.",
                    ),
                )
            self.requeue(f"{words} Goes on by itself where there is as much.", forecast=forecast)
        elif code == EXIT_CODES[Outcome.PREEMPTED] or outcomes.left_by_its_own_word(run):
            self.requeue(outcomes.words_of_pause(run))
        elif self.signalled and code == -signal.SIGTERM:
            self.requeue("Paused before its first step; begins by itself.")
        elif code == EXIT_CODES[Outcome.BUSY]:
            self.requeue("Another engine held this run's folder.")
        else:
            self.requeue_after_death(run, code)

    def conclude(self, run: Run, result: Result) -> None:
        state = outcomes.STATES[result.outcome]
        # a worker that was frozen and thawed finds out here, before it touches a file
        self.lease.renew()
        heldout = (
            result.eval_loss
            if result.eval_loss is not None and math.isfinite(result.eval_loss)
            else run.eval_loss
        )
        try:
            outcomes.finish(run, result)
        except (UserError, OSError) as error:
            state, result = (
                State.FAILED,
                Result(outcome=Outcome.CRASHED, message=f"The adapter was not kept: {error}"),
            )
        if (
            result.outcome is Outcome.MEMORY
            and run.wish == Wish.RUN
            and (words := oom_recovery.recover(run))
        ):
            return self.requeue(f"{result.message} {words}", deaths=0)
        self.release(
            state=state,
            failure=result.outcome if state == State.FAILED else "",
            message=outcomes.words_of_time(run)
            if run.wish == Wish.TIME and state == State.STOPPED
            else result.message,
            finished_at=Now(),
            eval_loss=heldout,
            phase="",
        )

    def requeue_after_death(self, run: Run, code: int | None) -> None:
        """Once more from the last checkpoint, after 1, 2, 4... seconds; MAX_CRASHES without progress
        are a crash loop.
        """
        words, deaths = (
            outcomes.words_of_death(code, killed_for_memory=self.engine.killed_for_memory),
            run.deaths + 1,
        )
        if deaths > settings.MAX_CRASHES:
            words += (
                f" {deaths} times in a row without a new checkpoint, last at step "
                f"{run.step}. {outcomes.last_words(run)}"
            )
            failure = KILLED if code == -signal.SIGKILL else Outcome.CRASHED
            return self.release(
                state=State.FAILED, failure=failure, message=words, finished_at=Now(), phase=""
            )
        memory = self.engine.killed_for_memory or (deaths > 1 and code == -signal.SIGKILL)
        changed = oom_recovery.recover(run) if memory and run.wish == Wish.RUN else ""
        wait = (
            timedelta(seconds=min(LONGEST_WAIT_SECONDS, 2 ** (deaths - 1)))
            if deaths > 1
            else timedelta()
        )
        self.requeue(
            f"{words} at step {run.step}; going on from its last checkpoint. {changed}".strip(),
            deaths=deaths,
            not_before=Now() + wait,
        )

    def requeue(self, message: str, **changes: object) -> None:
        self.release(state=State.QUEUED, message=message, phase="", **changes)

    def release(self, **changes: object) -> None:
        changes |= {
            "lease_token": "",
            "lease_owner": "",
            "lease_expires_at": None,
            "revision": F("revision") + 1,
        }
        # The message to the owner's webhooks is left exactly once, with the fenced change
        with transaction.atomic():
            self.lease.update(**changes)
            allocations.release(self.lease.run_id)
            if changes.get("state") in ENDED:
                tell_of_end(self.lease.run_id)
        run_changed.send(Run, run_id=self.lease.run_id)
