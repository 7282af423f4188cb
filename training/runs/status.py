"""The state of a run in words and numbers, the same for page, socket and API. It tells only what
the row knows.
"""

from __future__ import annotations

import math
from typing import Any

from django.utils import timezone

from training.gpus.ledger import used_by_run
from training.runs.models import Run
from training.runs.states import ACTIVE, State

STALE_SECONDS = 30.0  # the queue's words are written again every 10 s while a worker lives


def describe(run: Run) -> dict[str, Any]:
    """Everything that the header of a run's page shows."""
    return {
        "state": run.state,
        "label": label(run),
        "phase": phase(run),
        "message": run.message,
        "step": run.step,
        "total_steps": run.total_steps,
        "progress": progress(run),
        "seconds_left": seconds_left(run),
        "loss": run.loss,
        "eval_loss": run.eval_loss,
        "peak_memory_bytes": run.peak_memory_bytes,
        "attempt": run.attempt,
        "wish": run.wish,
        "priority": run.priority,
        "waits": run.waits if run.state == State.QUEUED else {},
        "started_at": run.started_at.timestamp() if run.started_at else None,
        "finished_at": run.finished_at.timestamp() if run.finished_at else None,
    }


def out_of_touch(run: Run) -> bool:
    """Active by its row, but no worker has renewed its lease: nobody knows how it is doing."""
    return (
        run.state in ACTIVE
        and run.lease_expires_at is not None
        and run.lease_expires_at < timezone.now()
    )


def label(run: Run) -> str:
    return "Out of touch" if out_of_touch(run) else State(run.state).label


def phase(run: Run) -> str:
    """`tokenizing 4,100 / 12,000`, or what a waiting run waits for."""
    if out_of_touch(run):
        return "no worker watches it; it goes on when one is back"
    if run.state == State.QUEUED:
        return waiting_words(run)
    if run.state not in ACTIVE:
        return ""
    if run.phase_total:
        return f"{run.phase} {run.phase_done or 0:,} / {run.phase_total:,}"
    return run.phase


def waiting_words(run: Run) -> str:
    """Place and reason in the queue; of old words nobody knows whether they still hold."""
    waits = run.waits
    if "given" in waits:
        return f"has been given {waits['given']}; its worker takes it up"
    if timezone.now().timestamp() - waits.get("at", 0) > STALE_SECONDS:
        return "waiting for a worker"
    return f"place {waits['place']} of {waits['of']}: {waits['reason']}"


def progress(run: Run) -> float:
    """Share of the steps that are done, 0 to 1."""
    return min(1.0, run.step / run.total_steps) if run.total_steps else 0.0


def seconds_left(run: Run) -> float | None:
    if run.state != State.RUNNING or run.seconds_per_step is None:
        return None
    return run.seconds_per_step * (run.total_steps - run.step)


def figures_of(run: Run) -> dict[str, Any]:
    """What a comparison shows of a run; see `metrics/comparison.FIGURES`."""
    return {
        "base": run.base_model_id,
        "best_eval_loss": run.best_eval_loss,
        "perplexity": math.exp(min(run.best_eval_loss, 700.0))
        if run.best_eval_loss is not None
        else None,
        "exact_match": run.exact_match,
        "eval_loss": run.eval_loss,
        "loss": run.loss,
        "peak_memory_bytes": run.peak_memory_bytes or None,
        "tokens_per_second": run.tokens_per_second,
        "trainable_parameters": run.plan.get("trainable_parameters"),
        "step": run.step or None,
        "device_seconds": used_by_run(run.pk) if run.finished_at else None,
    }
