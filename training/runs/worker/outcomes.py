"""What an ended engine means for its run: the state, the words, and what is done with its files."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable

from training.engine.outcome import EXIT_CODES, Outcome, Result
from training.formatting import format_bytes
from training.gpus.models import Allocation
from training.runs.models import Event, Run
from training.runs.states import State

OUTCOME_STATES: dict[Outcome, State] = {
    Outcome.FINISHED: State.FINISHED,
    Outcome.STOPPED: State.STOPPED,
    Outcome.DISCARDED: State.CANCELLED,
    Outcome.CONFIG: State.FAILED,
    Outcome.DATA: State.FAILED,
    Outcome.DIVERGED: State.FAILED,
    Outcome.MEMORY: State.FAILED,
    Outcome.DISK: State.FAILED,
    Outcome.CRASHED: State.FAILED,
}

# `adapters` puts what came out on its shelf here; it stands right of this room, so it may not be
# imported (ARCHITECTURE.md).
artifact_hooks: list[Callable[[Run, Result], None]] = []


def finalize_run(run: Run, result: Result) -> None:
    """Hand the adapter to the shelf, or throw a discarded run's files away. Doing it twice is the
    same as once.
    """
    if result.outcome is Outcome.DISCARDED:
        for name in ("checkpoints", "adapter", "trials"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    elif result.adapter_step is not None:
        for save_artifact in artifact_hooks:
            save_artifact(run, result)


def format_crash_message(code: int | None, *, was_oom_killed: bool) -> str:
    """A sentence's beginning for an engine that left no result."""
    if code is None:
        return "The engine died while no worker watched"
    if code == -signal.SIGKILL:
        return (
            "The engine was killed "
            f"(SIGKILL{'; memory ran out on its host at that moment' if was_oom_killed else ''})"
        )
    if code < 0:
        return f"The engine died of {signal.Signals(-code).name}"
    if code == EXIT_CODES[Outcome.CRASHED]:
        return "The engine crashed"
    return f"The engine ended with code {code}"


def format_eviction_message(run: Run, allocation: Allocation) -> str:
    """Why it had to leave its device, and what that cost."""
    reason = (
        f"for run {allocation.evicted_for}"
        if allocation.evicted_for
        else "by an admin, who drains its devices"
    )
    return (
        f"Stopped {reason} at step {run.step:,}; {format_lost_steps(run)}. Goes on by itself when "
        "there is a device."
    )


def format_pause_message(run: Run) -> str:
    if not (run.folder / "checkpoints").exists() and (run.folder / "trials").exists():
        return "Paused among its trials; goes on by itself with the one that was under way."
    return f"Paused at step {run.step} with a checkpoint; goes on by itself."


def format_over_memory_message(run: Run, used_bytes: int) -> str:
    """It took more of a device that others use than it had reserved there."""
    reserved = run.forecast.get("peak", 0)
    return (
        f"Stopped at step {run.step:,}: it took {format_bytes(used_bytes)} of a device that others use, "
        f"and had reserved {format_bytes(reserved)}; {format_lost_steps(run)}."
    )


def format_lost_steps(run: Run) -> str:
    """The steps since its checkpoint, in words."""
    saved_step = (
        Event.objects.filter(run=run, kind="checkpoint", superseded=False)
        .order_by("-seq")
        .values_list("step", flat=True)
        .first()
    )
    lost_steps = run.step - (saved_step or 0)
    return (
        "no step is lost"
        if not lost_steps
        else f"{lost_steps:,} {'step' if lost_steps == 1 else 'steps'} since its checkpoint are trained again"
    )


def build_stopped_result(run: Run) -> Result:
    """For an engine that saved and left for another reason while somebody wished it to stop."""
    return Result(
        outcome=Outcome.STOPPED, message=f"Stopped after step {run.step:,}; its checkpoint is kept."
    )


def format_time_limit_message(run: Run) -> str:
    return (
        f"Stopped at step {run.step:,}: it held devices for as long as its team's runs may. "
        "What it learned is kept; an admin may let it go on."
    )


def has_exited_cleanly(run: Run) -> bool:
    """The last event says that the engine saved and left. For an engine that another worker started
    there is no exit code.
    """
    last = Event.objects.filter(run=run, seq=run.last_seq, kind="end").first()
    return last is not None and last.fields.get("outcome") == Outcome.PREEMPTED


def get_last_error(run: Run) -> str:
    """The last line of the last error that the engine wrote to its journal."""
    errors = (
        Event.objects.filter(run=run, kind="end")
        .order_by("-seq")
        .values_list("fields", flat=True)[:1]
    )
    return next((str(payload.get("message", "")) for payload in errors), "")
