"""Journal lines -> rows, exactly once: events, the run's own row and the journal offset in one
transaction under the fence.

If the worker dies before the commit, the next one reads the same lines again; if after, it reads on
behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

from django.db import transaction
from django.db.models import F, Q

from training.runs.metrics.chunks import compact, events_of_chunk
from training.runs.models import CurveChunk, Event, Run
from training.runs.states import State
from training.runs.worker.lease import Lease

SPARKLINE_POINTS = 60
RATE_MEMORY = 0.9  # share of the old value in the moving mean of seconds per step
OWN_COLUMNS = ("seq", "time", "kind", "step")

Line = dict[str, Any]


class BrokenJournal(Exception):
    """The journal's numbers do not follow on what is stored; the disk lost a part of it."""


def store(lease: Lease, run: Run, lines: Sequence[Line], offset: int) -> None:
    """Store events that follow `run.last_seq`, and what they say of the run. `run` is updated in
    place.

    Raises:
        LeaseLost: nothing is stored.
        BrokenJournal: a number is missing or twice; nothing is stored.
    """
    for place, line in enumerate(lines, start=run.last_seq + 1):
        if line["seq"] != place:
            raise BrokenJournal(
                f"The journal of run {run.pk} goes from event {place - 1} to {line['seq']}."
            )
    draft = copy(run)  # a failed transaction must not leave `run` ahead of the database
    changes: dict[str, Any] = {"last_seq": lines[-1]["seq"], "journal_offset": offset}
    with transaction.atomic():
        Event.objects.bulk_create([event_of(run.pk, line) for line in lines])
        for line in lines:
            said = RULES[line["kind"]](draft, line) if line["kind"] in RULES else {}
            draft.__dict__.update(said)
            changes |= said
        lease.update(**changes, revision=F("revision") + 1)
        if any(line["kind"] == "step" for line in lines):
            compact(run.pk)
    run.__dict__.update(changes)


def event_of(run_id: int, line: Line) -> Event:
    return Event(
        run_id=run_id,
        seq=line["seq"],
        kind=line["kind"],
        step=line.get("step"),
        time=line["time"],
        payload={name: clean(value) for name, value in line.items() if name not in OWN_COLUMNS},
    )


def clean(value: Any) -> Any:
    """A model may write a NUL, which PostgreSQL's JSON cannot hold."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value


def on_phase(run: Run, line: Line) -> dict[str, Any]:
    return {"phase": line["name"], "phase_done": line.get("done"), "phase_total": line.get("total")}


def on_start(run: Run, line: Line) -> dict[str, Any]:
    # Conditional, since a person may have asked to stop in this very moment.
    Run.objects.filter(pk=run.pk, state=State.STARTING).update(state=State.RUNNING)
    plan = {name: value for name, value in line.items() if name not in OWN_COLUMNS}
    return {"plan": plan, "total_steps": line["total_steps"]}


def on_step(run: Run, line: Line) -> dict[str, Any]:
    loss, seconds = float(line["loss"]), float(line["seconds"])
    return {
        "step": line["step"],
        "loss": loss if math.isfinite(loss) else None,
        "seconds_per_step": moving(run.seconds_per_step, seconds),
        "tokens_per_second": moving(run.tokens_per_second, float(line["tokens_per_second"])),
        "sparkline": thinned([*run.sparkline, round(loss, 4)])
        if math.isfinite(loss)
        else run.sparkline,
        **on_memory(run, line),
    }


def moving(old: float | None, new: float) -> float:
    return new if old is None else RATE_MEMORY * old + (1 - RATE_MEMORY) * new


def on_memory(run: Run, line: Line) -> dict[str, Any]:
    return {"peak_memory_bytes": max(run.peak_memory_bytes, line["memory_peak_bytes"])}


def on_eval(run: Run, line: Line) -> dict[str, Any]:
    loss = float(line["heldout_loss"])
    if not math.isfinite(loss):
        return {"heldout_loss": None}
    better = run.best_heldout_loss is None or loss < run.best_heldout_loss
    return {"heldout_loss": loss} | (
        {"best_heldout_loss": loss, "best_step": line["step"]} if better else {}
    )


def on_answers(run: Run, line: Line) -> dict[str, Any]:
    return {"exact_match": line["exact_match"]}


def on_trial(run: Run, line: Line) -> dict[str, Any]:
    return {"deaths": 0} if line["outcome"] in ("done", "stopped") else {}


def on_tuned(run: Run, line: Line) -> dict[str, Any]:
    """Trials chose settings: the run goes on with those."""
    return {
        "config": {**run.config, **line["settings"]},
        "plan": {**run.plan, "trainable_parameters": line["trainable_parameters"]},
    }


def on_checkpoint(run: Run, line: Line) -> dict[str, Any]:
    return {"deaths": 0}  # it got further, so it is no crash loop


def on_resume(run: Run, line: Line) -> dict[str, Any]:
    """The steps after this one are trained again: what earlier attempts said of them is kept
    aside.
    """
    step, seq = line["step"], line["seq"]
    later = {"run_id": run.pk, "superseded": False}
    for chunk in CurveChunk.objects.filter(**later, last_step__gt=step):
        unpack(chunk)
    again = (
        Q(step__gt=step) if step else Q(step__gte=0)
    )  # from the very beginning, step 0's evaluation comes again too
    past = Event.objects.filter(again, **later, seq__lt=seq).exclude(kind__in=("resume", "end"))
    past.update(superseded=True)
    kept = Event.objects.filter(run_id=run.pk, kind="eval", superseded=False).order_by("seq")
    losses = [(float(event.payload["heldout_loss"]), event.step) for event in kept]
    finite = [(loss, at) for loss, at in losses if math.isfinite(loss)]
    best, at = min(finite, default=(None, None))
    return {
        "step": step,
        "heldout_loss": finite[-1][0] if finite else None,
        "best_heldout_loss": best,
        "best_step": at,
    }


def unpack(chunk: CurveChunk) -> None:
    """Turn a chunk that a rewind cuts through back into events. A chunk is 512 steps, so this is
    rare and small.
    """
    Event.objects.bulk_create(events_of_chunk(chunk))
    chunk.delete()


def thinned(points: list[float]) -> list[float]:
    """At most SPARKLINE_POINTS: every second one goes when there are too many."""
    return points if len(points) <= SPARKLINE_POINTS else points[::2]


RULES = {
    "phase": on_phase,
    "start": on_start,
    "step": on_step,
    "memory": on_memory,
    "eval": on_eval,
    "checkpoint": on_checkpoint,
    "answers": on_answers,
    "trial": on_trial,
    "tuned": on_tuned,
    "resume": on_resume,
}
