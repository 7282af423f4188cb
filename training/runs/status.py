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


def get_run_status(run: Run) -> dict[str, Any]:
    """Everything that the header of a run's page shows."""
    return {
        "state": run.state,
        "label": format_state(run),
        "phase": format_phase(run),
        "message": run.message,
        "step": run.step,
        "total_steps": run.total_steps,
        "progress": get_progress(run),
        "seconds_left": estimate_seconds_left(run),
        "loss": run.loss,
        "eval_loss": run.eval_loss,
        "peak_memory_bytes": run.peak_memory_bytes,
        "attempt": run.attempt,
        "requested_action": run.requested_action,
        "priority": run.priority,
        "queue_info": run.queue_info if run.state == State.QUEUED else {},
        "started_at": run.started_at.timestamp() if run.started_at else None,
        "finished_at": run.finished_at.timestamp() if run.finished_at else None,
    }


def is_worker_lost(run: Run) -> bool:
    """Active by its row, but no worker has renewed its lease: nobody knows how it is doing."""
    return (
        run.state in ACTIVE
        and run.lease_expires_at is not None
        and run.lease_expires_at < timezone.now()
    )


def format_state(run: Run) -> str:
    return "Out of touch" if is_worker_lost(run) else State(run.state).label


def format_phase(run: Run) -> str:
    """`tokenizing 4,100 / 12,000`, or what a waiting run waits for."""
    if is_worker_lost(run):
        return "no worker watches it; it goes on when one is back"
    if run.state == State.QUEUED:
        return format_queue_status(run)
    if run.state not in ACTIVE:
        return ""
    if run.phase_total:
        return f"{run.phase} {run.phase_done or 0:,} / {run.phase_total:,}"
    return run.phase


def format_queue_status(run: Run) -> str:
    """Place and reason in the queue; of old words nobody knows whether they still hold."""
    queue_info = run.queue_info
    if "device" in queue_info:
        return f"has been given {queue_info['device']}; its worker takes it up"
    if timezone.now().timestamp() - queue_info.get("at", 0) > STALE_SECONDS:
        return "waiting for a worker"
    return f"place {queue_info['position']} of {queue_info['total']}: {queue_info['reason']}"


def get_progress(run: Run) -> float:
    """Share of the steps that are done, 0 to 1."""
    return min(1.0, run.step / run.total_steps) if run.total_steps else 0.0


def estimate_seconds_left(run: Run) -> float | None:
    if run.state != State.RUNNING or run.seconds_per_step is None:
        return None
    return run.seconds_per_step * (run.total_steps - run.step)


def get_comparison_figures(run: Run) -> dict[str, Any]:
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
        "trainable_parameters": run.start_info.get("trainable_parameters"),
        "step": run.step or None,
        "device_seconds": used_by_run(run.pk) if run.finished_at else None,
    }
