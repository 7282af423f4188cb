"""The states of a run and the moves between them: one table, and nothing moves outside it."""

from __future__ import annotations

from django.db import models


class State(models.TextChoices):
    QUEUED = "queued", "Waiting"
    STARTING = "starting", "Starting"
    RUNNING = "running", "Running"
    STOPPING = "stopping", "Stopping"
    FINISHED = "finished", "Finished"
    STOPPED = "stopped", "Stopped"
    CANCELLED = "cancelled", "Cancelled"
    FAILED = "failed", "Failed"


class RequestedAction(models.TextChoices):
    """What its people want of a run; the worker that watches it looks every 250 ms."""

    RUN = "run", "go on"
    STOP = "stop", "stop and save"
    DISCARD = "discard", "stop and discard"
    TIME_LIMIT = "time", "stop and save, its time is up"


class Priority(models.TextChoices):
    """The classes of training/gpus/scheduling/state.py; admins grant the first."""

    URGENT = "urgent", "Urgent"
    NORMAL = "normal", "Normal"
    BACKGROUND = "background", "Background"


ACTIVE = (State.STARTING, State.RUNNING, State.STOPPING)
UNFINISHED = (State.QUEUED, *ACTIVE)
ENDED = (State.FINISHED, State.STOPPED, State.CANCELLED, State.FAILED)

TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STARTING, State.CANCELLED, State.STOPPED}),
    State.STARTING: frozenset({State.RUNNING, State.STOPPING, State.QUEUED, *ENDED}),
    State.RUNNING: frozenset({State.STOPPING, State.QUEUED, *ENDED}),
    State.STOPPING: frozenset({State.QUEUED, *ENDED}),
    State.STOPPED: frozenset({State.QUEUED}),
    State.FAILED: frozenset({State.QUEUED}),
    State.FINISHED: frozenset(),
    State.CANCELLED: frozenset(),
}


def get_source_states(state: State) -> list[State]:
    """The states from which a run may come to this one."""
    return [source for source, targets in TRANSITIONS.items() if state in targets]
