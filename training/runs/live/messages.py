"""The messages that a browser gets about a run: a snapshot, then everything after its cursor. Pure
reads without socket.

Event numbers have no gaps, so a reader that has event n requests what comes after n and can check
that the first one is n + 1.
"""

from __future__ import annotations

from typing import Any

from training.runs.metrics.chunks import read_chunk_events
from training.runs.metrics.curves import read_curves
from training.runs.models import CurveChunk, Event, Run
from training.runs.reads import consistent_read
from training.runs.status import get_run_status

SNAPSHOT_KINDS = (
    "eval",
    "sample",
    "memory",
    "checkpoint",
    "resume",
    "start",
    "end",
    "log",
    "trial",
    "tuned",
)
SNAPSHOT_EVENTS = 500  # the newest of each kind; a run has a few dozen
DELTA_EVENTS = 2_000
RESYNC_THRESHOLD = 5_000  # a reader that lacks more events gets a snapshot

Message = dict[str, Any]


def build_snapshot(run_id: int, points: int) -> Message:
    """The run up to event `upto`: status, curves of at most 2 x `points` points, and the newest
    other events.
    """
    events: list[Event] = []
    with consistent_read():
        run = load_run(run_id)
        curves = read_curves(run_id, points=points)
        for kind in SNAPSHOT_KINDS:
            rows = Event.objects.filter(run_id=run_id, kind=kind, superseded=False)
            events += rows.order_by("-seq")[:SNAPSHOT_EVENTS]
    events.sort(key=lambda event: event.seq)
    return {
        "type": "snap",
        "run": run_id,
        "points": points,
        "upto": run.last_seq,
        "revision": run.revision,
        "state": get_run_status(run),
        "curves": curves.to_packed(),
        "events": [event_to_json(event) for event in events],
    }


def build_delta(run_id: int, cursor: int) -> Message:
    """The events after `cursor` without gaps; at most DELTA_EVENTS, the next delta has the rest."""
    with consistent_read():
        run = load_run(run_id)
        rows = read_events_after(run_id, cursor, DELTA_EVENTS)
    events = [event_to_json(event) for event in rows]
    last = events[-1]["seq"] if events else cursor
    return {
        "type": "delta",
        "run": run_id,
        "first": cursor + 1,
        "last": last,
        "revision": run.revision,
        "state": get_run_status(run),
        "events": events,
    }


def read_events_after(run_id: int, cursor: int, limit: int) -> list[Event]:
    """The next `limit` events after number `cursor`, from rows and chunks."""
    events_by_seq = {
        event.seq: event for event in Event.objects.filter(run_id=run_id, seq__gt=cursor)[:limit]
    }
    for chunk in CurveChunk.objects.filter(run_id=run_id, last_seq__gt=cursor).order_by(
        "first_seq"
    ):
        # Chunks of superseded and of current steps overlap. Stop at a chunk that starts after all
        # events that are needed.
        if len(events_by_seq) >= limit and chunk.first_seq > sorted(events_by_seq)[limit - 1]:
            break
        events_by_seq |= {
            event.seq: event for event in read_chunk_events(chunk) if event.seq > cursor
        }
    return [events_by_seq[seq] for seq in sorted(events_by_seq)][:limit]


def load_run(run_id: int) -> Run:
    run: Run = Run.objects.select_related("base_model", "data__dataset").get(pk=run_id)
    return run


def event_to_json(event: Event) -> dict[str, Any]:
    """The event as in the journal, and whether a later attempt superseded it."""
    fields = {"seq": event.seq, "time": event.time, "kind": event.kind, **event.fields}
    if event.step is not None:
        fields["step"] = event.step
    if event.superseded:
        fields["superseded"] = True
    return fields
