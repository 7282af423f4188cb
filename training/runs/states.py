"""The states of a run and the transitions between them."""

from __future__ import annotations

from django.db import models


class State(models.TextChoices):
    QUEUED = "queued", "Queued"
    STARTING = "starting", "Starting"
    RUNNING = "running", "Running"
    STOPPING = "stopping", "Stopping"
    FINISHED = "finished", "Finished"
    STOPPED = "stopped", "Stopped"
    CANCELLED = "cancelled", "Canceled"
    FAILED = "failed", "Failed"


class RequestedAction(models.TextChoices):
    """What a user wants a run to do. The run's supervisor checks this every 250 ms."""

    RUN = "run", "run"
    STOP = "stop", "stop and save"
    DISCARD = "discard", "stop and discard"
    TIME_LIMIT = "time_limit", "stop and save, time limit reached"


class Priority(models.TextChoices):
    """The priorities of training/gpus/scheduling/state.py. Only admins grant urgent."""

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
    """The states that have a transition to this state."""
    return [source for source, targets in TRANSITIONS.items() if state in targets]
