"""States and messages of runs whose engine has exited, and the hooks that save their artifacts."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable

from training.engine.files import FOLDER_VANISHED
from training.engine.outcome import EXIT_CODES, Outcome, Result
from training.formatting import format_bytes
from training.gpus.models import Allocation
from training.runs.models import Event, Run
from training.runs.run_files import list_checkpoint_steps
from training.runs.states import State
from training.runs.worker.exits import ExitAction

OUTCOME_STATES: dict[Outcome, State] = {
    Outcome.FINISHED: State.FINISHED,
    Outcome.STOPPED: State.STOPPED,
    Outcome.DISCARDED: State.CANCELLED,
    Outcome.CONFIG_ERROR: State.FAILED,
    Outcome.DATA_ERROR: State.FAILED,
    Outcome.DIVERGED: State.FAILED,
    Outcome.OUT_OF_MEMORY: State.FAILED,
    Outcome.DISK_FULL: State.FAILED,
    Outcome.FAULT: State.FAILED,
    Outcome.CRASHED: State.FAILED,
}

# `adapters` registers a hook that saves the adapter of a run. This package must not import
# `adapters` (ARCHITECTURE.md).
artifact_hooks: list[Callable[[Run, Result], None]] = []


def finalize_run(run: Run, result: Result) -> None:
    """Save the artifacts of a run, or delete the files of a discarded run. Calling it twice has the
    same effect as once.
    """
    if result.outcome is Outcome.DISCARDED:
        for name in ("checkpoints", "adapter", "trials"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    elif result.adapter_step is not None:
        for save_artifact in artifact_hooks:
            save_artifact(run, result)


def format_crash_message(code: int | None, *, was_oom_killed: bool) -> str:
    """The start of a message about an engine that left no result."""
    if code is None:
        return "The engine died while no worker was supervising it"
    if code == -signal.SIGKILL:
        reason = "; its host ran out of memory" if was_oom_killed else ""
        return f"The engine was killed (SIGKILL{reason})"
    if code < 0:
        return f"The engine died with {signal.Signals(-code).name}"
    if code == EXIT_CODES[Outcome.CRASHED]:
        return "The engine crashed"
    return f"The engine exited with code {code}"


def format_eviction_message(run: Run, allocation: Allocation) -> str:
    """Why the run was preempted, and what that costs."""
    reason = (
        f"for run {allocation.evicted_for}"
        if allocation.evicted_for
        else "by an admin who is draining its devices"
    )
    return (
        f"Preempted {reason} at step {run.step:,}; {format_lost_steps(run)}. It resumes when a "
        "device is free."
    )


def format_pause_message(run: Run) -> str:
    if not list_checkpoint_steps(run):
        if (run.folder / "trials").exists():
            return "Paused during its trials. It resumes with the interrupted trial."
        return f"Paused at step {run.step} without a checkpoint. It restarts automatically."
    return f"Paused at step {run.step} with a checkpoint. It resumes automatically."


def format_over_memory_message(run: Run, used_bytes: int) -> str:
    """The run used more of a shared device than it had reserved."""
    reserved = run.forecast.get("peak", 0)
    return (
        f"Stopped at step {run.step:,}: it used {format_bytes(used_bytes)} of a shared device and "
        f"had reserved {format_bytes(reserved)}; {format_lost_steps(run)}."
    )


def format_lost_steps(run: Run) -> str:
    """How many steps since the last checkpoint have to be repeated."""
    saved_step = (
        Event.objects.filter(run=run, kind="checkpoint", superseded=False)
        .order_by("-seq")
        .values_list("step", flat=True)
        .first()
    )
    lost_steps = run.step - (saved_step or 0)
    if not lost_steps:
        return "no steps are lost"
    if lost_steps == 1:
        return "1 step since the last checkpoint is repeated"
    return f"{lost_steps:,} steps since the last checkpoint are repeated"


def build_discarded_result(run: Run) -> Result:
    return Result(outcome=Outcome.DISCARDED)


def build_empty_result(run: Run) -> Result:
    """The result of a run that was stopped before it had a checkpoint."""
    message = "Stopped before the first checkpoint; nothing was saved."
    return Result(outcome=Outcome.STOPPED, message=message)


def build_disk_full_result(run: Run) -> Result:
    """The result of an engine that could not write its own."""
    if not run.folder.is_dir():
        problem = FOLDER_VANISHED
    else:
        problem = "The disk is full, or read-only. Free some space, then continue the run."
    message = f"Stopped at step {run.step:,}. {problem}"
    return Result(outcome=Outcome.DISK_FULL, message=message, step=run.step)


def build_no_config_result(run: Run) -> Result:
    """The result of an engine that found no settings."""
    message = "The run's folder has no config.json. Restore it, or start the run again."
    return Result(outcome=Outcome.CONFIG_ERROR, message=message, step=run.step)


def build_stopped_result(run: Run) -> Result:
    """The result of an engine that saved a checkpoint for another reason while a user was stopping
    the run.
    """
    message = f"Stopped after step {run.step:,}. The checkpoint is kept."
    return Result(outcome=Outcome.STOPPED, message=message)


# The results of engines that exited without writing one
RESULT_BUILDERS = {
    ExitAction.DISCARDED: build_discarded_result,
    ExitAction.STOPPED_EMPTY: build_empty_result,
    ExitAction.STOPPED: build_stopped_result,
    ExitAction.DISK_FULL: build_disk_full_result,
    ExitAction.NO_CONFIG: build_no_config_result,
}


def format_time_limit_message(run: Run, result: Result) -> str:
    if result.adapter_step is not None:
        saved = "The adapter was saved."
    elif list_checkpoint_steps(run):
        saved = "The checkpoint is kept."
    else:
        saved = "Nothing was saved."
    return (
        f"Stopped at step {run.step:,}: it reached its team's time limit. {saved} An admin can "
        "resume the run."
    )


def has_exited_cleanly(run: Run) -> bool:
    """Whether the last event says that the engine saved a checkpoint and exited. An engine that
    another worker started has no exit code here.
    """
    last = Event.objects.filter(run=run, seq=run.last_seq, kind="end").first()
    return last is not None and last.fields.get("outcome") == Outcome.PREEMPTED


def get_last_error(run: Run) -> str:
    """The last error message in the journal."""
    errors = (
        Event.objects.filter(run=run, kind="end")
        .order_by("-seq")
        .values_list("fields", flat=True)[:1]
    )
    return next((str(fields.get("message", "")) for fields in errors), "")
