"""The status of a run as text and figures, the same for pages, socket and API. It uses only the
run's row.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from django.utils import timezone

from training.gpus.ledger import get_run_seconds
from training.runs.models import Run
from training.runs.states import ACTIVE, State

STALE_SECONDS = 30.0  # a running worker checks queue_info every 10 s


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
    """Whether the run is active but its lease has expired: its worker is not responding."""
    return (
        run.state in ACTIVE
        and run.lease_expires_at is not None
        and run.lease_expires_at < timezone.now()
    )


def format_state(run: Run) -> str:
    return "Worker not responding" if is_worker_lost(run) else State(run.state).label


def format_phase(run: Run) -> str:
    """`tokenizing 4,100 / 12,000`, or why a queued run is waiting."""
    if is_worker_lost(run):
        return "training continues when a worker is available again"
    if run.state == State.QUEUED:
        return format_queue_status(run)
    if run.state not in ACTIVE:
        return ""
    if run.phase_total:
        return f"{run.phase} {run.phase_done or 0:,} / {run.phase_total:,}"
    return run.phase


def format_queue_status(run: Run) -> str:
    """Position and reason in the queue. Information older than STALE_SECONDS is ignored."""
    queue_info = run.queue_info
    if "device" in queue_info:
        return f"assigned to {queue_info['device']}, starting…"
    oldest = timezone.now() - timedelta(seconds=STALE_SECONDS)
    if not queue_info or run.queue_info_at is None or run.queue_info_at < oldest:
        return "waiting for a worker"
    position, total = queue_info["position"], queue_info["total"]
    return f"position {position} of {total}: {queue_info['reason']}"


def get_progress(run: Run) -> float:
    """The completed fraction of the steps, 0 to 1."""
    return min(1.0, run.step / run.total_steps) if run.total_steps else 0.0


def estimate_seconds_left(run: Run) -> float | None:
    if run.state != State.RUNNING or run.seconds_per_step is None:
        return None
    return run.seconds_per_step * (run.total_steps - run.step)


def get_comparison_figures(run: Run) -> dict[str, Any]:
    """The figures of a run for a comparison; see `metrics/comparison.FIGURES`."""
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
        "device_seconds": get_run_seconds(run.pk) if run.finished_at else None,
    }
