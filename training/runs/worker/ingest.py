"""Store journal events as rows, exactly once. Events, the run's own row and the journal offset are
written in one transaction under the lease.

If the worker dies before the commit, the next one reads the same events again; if it dies after the
commit, the next one continues behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

from django.db import DataError, transaction
from django.db.models import F, Q

from training.engine.config import EXCLUDED_ROW_SETTINGS
from training.engine.events import BrokenJournal
from training.engine.files import measure_tree
from training.runs.metrics.chunks import compact_steps, read_chunk_events
from training.runs.models import CurveChunk, Event, Run
from training.runs.states import State
from training.runs.worker.lease import Lease
from training.text_input import clean_value

SPARKLINE_POINTS = 60
EMA_DECAY = 0.9  # weight of the old value in moving averages of rates
EVENT_COLUMNS = ("seq", "time", "kind", "step")

JournalEvent = dict[str, Any]  # seq, time, kind and step, and the fields of its kind


def store_events(lease: Lease, run: Run, events: Sequence[JournalEvent], offset: int) -> None:
    """Store events that follow `run.last_seq`, and update the run's row from them. `run` is updated
    in place.

    Raises:
        LeaseLost: nothing is stored.
        BrokenJournal: an event number is missing or repeated, or an event lacks a field or has one
            of another type; nothing is stored.
    """
    for seq, event in enumerate(events, start=run.last_seq + 1):
        if event["seq"] != seq:
            raise BrokenJournal(
                f"The journal of run {run.pk} is damaged: event {seq - 1} is followed by event "
                f"{event['seq']}."
            )
    changes: dict[str, Any] = {"last_seq": events[-1]["seq"], "journal_offset": offset}
    try:
        with transaction.atomic():
            Event.objects.bulk_create([build_event_row(run.pk, event) for event in events])
            changes |= handle_events(run, events)
            lease.update_run(**changes, revision=F("revision") + 1)
            if any(event["kind"] == "step" for event in events):
                compact_steps(run.pk)
    except (LookupError, TypeError, ValueError, ArithmeticError, DataError) as error:
        raise BrokenJournal(
            f"The journal of run {run.pk} is damaged between events {run.last_seq + 1} and "
            f"{events[-1]['seq']} ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    run.__dict__.update(changes)


def handle_events(run: Run, events: Sequence[JournalEvent]) -> dict[str, Any]:
    """What the events change in the run's row. `run` stays as it is: a failed transaction must not
    leave it ahead of the database.
    """
    draft, changes = copy(run), dict[str, Any]()
    for event in events:
        if event["kind"] in EVENT_HANDLERS:
            change = EVENT_HANDLERS[event["kind"]](draft, event)
            draft.__dict__.update(change)
            changes |= change
    return changes


def build_event_row(run_id: int, event: JournalEvent) -> Event:
    return Event(
        run_id=run_id,
        seq=event["seq"],
        kind=event["kind"],
        step=event.get("step"),
        time=event["time"],
        fields=get_event_fields(event),
    )


def get_event_fields(event: JournalEvent) -> dict[str, Any]:
    """The fields without a column, as text that databases store: a model may generate NUL."""
    return {name: clean_value(value) for name, value in event.items() if name not in EVENT_COLUMNS}


def on_phase(run: Run, event: JournalEvent) -> dict[str, Any]:
    return {
        "phase": event["name"],
        "phase_done": event.get("done"),
        "phase_total": event.get("total"),
    }


def on_start(run: Run, event: JournalEvent) -> dict[str, Any]:
    # Conditional, because a user may have just asked to stop.
    Run.objects.filter(pk=run.pk, state=State.STARTING).update(state=State.RUNNING)
    fields = get_event_fields(event)
    # Rows that the template rejected are known only now. With their numbers in the config, the run
    # can be repeated on the same rows.
    excluded = {name: fields[name] for name in EXCLUDED_ROW_SETTINGS if fields.get(name)}
    change = {"start_info": fields, "total_steps": event["total_steps"]}
    return change | ({"config": run.config | excluded} if excluded else {})


def on_step(run: Run, event: JournalEvent) -> dict[str, Any]:
    loss, seconds = float(event["loss"]), float(event["seconds"])
    return {
        "step": event["step"],
        "loss": loss if math.isfinite(loss) else None,
        "seconds_per_step": update_ema(run.seconds_per_step, seconds),
        "tokens_per_second": update_ema(run.tokens_per_second, float(event["tokens_per_second"])),
        "sparkline": downsample_sparkline([*run.sparkline, round(loss, 4)])
        if math.isfinite(loss)
        else run.sparkline,
        **on_memory(run, event),
    }


def update_ema(old: float | None, new: float) -> float:
    return new if old is None else EMA_DECAY * old + (1 - EMA_DECAY) * new


def on_memory(run: Run, event: JournalEvent) -> dict[str, Any]:
    return {"peak_memory_bytes": max(run.peak_memory_bytes, event["memory_peak_bytes"])}


def on_eval(run: Run, event: JournalEvent) -> dict[str, Any]:
    loss = float(event["eval_loss"])
    if not math.isfinite(loss):
        return {"eval_loss": None}
    is_best = run.best_eval_loss is None or loss < run.best_eval_loss
    return {"eval_loss": loss} | (
        {"best_eval_loss": loss, "best_step": event["step"]} if is_best else {}
    )


def on_exact_match(run: Run, event: JournalEvent) -> dict[str, Any]:
    return {"exact_match": event["exact_match"]}


def on_trial(run: Run, event: JournalEvent) -> dict[str, Any]:
    return {"crash_count": 0} if event["outcome"] in ("done", "stopped") else {}


def on_tuned(run: Run, event: JournalEvent) -> dict[str, Any]:
    """The trials have chosen settings, which the run now uses."""
    return {
        "config": {**run.config, **event["settings"]},
        "start_info": {**run.start_info, "trainable_parameters": event["trainable_parameters"]},
    }


def on_checkpoint(run: Run, event: JournalEvent) -> dict[str, Any]:
    # There is progress, so this is not a crash loop. Until the run ends, the disk space that was
    # reserved at its launch counts, unless it has taken more.
    return {"crash_count": 0, "disk_bytes": max(run.disk_bytes, measure_tree(run.folder))}


def on_resume(run: Run, event: JournalEvent) -> dict[str, Any]:
    """The steps after this one are trained again: mark what earlier attempts reported about them as
    superseded.
    """
    step, seq = event["step"], event["seq"]
    current_events = {"run_id": run.pk, "superseded": False}
    for chunk in CurveChunk.objects.filter(**current_events, last_step__gt=step):
        reopen_chunk(chunk)
    # A restart from the beginning repeats the evaluation at step 0, too
    repeated = Q(step__gt=step) if step else Q(step__gte=0)
    outdated_events = Event.objects.filter(repeated, **current_events, seq__lt=seq).exclude(
        kind__in=("resume", "end")
    )
    outdated_events.update(superseded=True)
    evals = Event.objects.filter(run_id=run.pk, kind="eval", superseded=False).order_by("seq")
    losses = [(float(row.fields["eval_loss"]), row.step) for row in evals]
    finite = [(loss, at) for loss, at in losses if math.isfinite(loss)]
    best, best_step = min(finite, default=(None, None))
    return {
        "step": step,
        "eval_loss": finite[-1][0] if finite else None,
        "best_eval_loss": best,
        "best_step": best_step,
    }


def reopen_chunk(chunk: CurveChunk) -> None:
    """Turn a chunk that is partly superseded back into events. A chunk has 512 steps, so this is
    rare and cheap.
    """
    Event.objects.bulk_create(read_chunk_events(chunk))
    chunk.delete()


def downsample_sparkline(points: list[float]) -> list[float]:
    """At most SPARKLINE_POINTS: drop every second point when there are more."""
    return points if len(points) <= SPARKLINE_POINTS else points[::2]


EVENT_HANDLERS = {
    "phase": on_phase,
    "start": on_start,
    "step": on_step,
    "memory": on_memory,
    "eval": on_eval,
    "checkpoint": on_checkpoint,
    "exact_match": on_exact_match,
    "trial": on_trial,
    "tuned": on_tuned,
    "resume": on_resume,
}
