"""What the exit of an engine means for its run, as a table."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum, auto

from training.engine.outcome import EXIT_CODES, Outcome


class StopReason(Enum):
    """Why the supervisor asked the engine to stop. There may be several reasons at once."""

    DISCARD = auto()  # a user wants to stop the run and discard its files
    STOP = auto()  # a user or the time limit wants to stop the run and save its adapter
    EVICTION = auto()  # another run or an admin needs the device
    OVER_MEMORY = auto()  # the engine used more of a shared device than it had reserved
    SIGTERM = auto()  # the supervisor sent SIGTERM, for one of the reasons above or at shutdown


class ExitAction(Enum):
    """What happens to the run. The first six end it; the others queue it again."""

    RESULT = auto()  # recorded as the engine's result.json says
    DISCARDED = auto()
    STOPPED_EMPTY = auto()  # stopped before there was a checkpoint
    STOPPED = auto()
    DISK_FULL = auto()  # the engine had no room to write its result
    NO_CONFIG = auto()  # the run's folder has no config.json
    EVICTED = auto()
    OVER_MEMORY = auto()  # fails instead if no device of the pool allows as much memory
    PAUSED = auto()
    PAUSED_EARLY = auto()  # before the engine could handle SIGTERM
    FOLDER_BUSY = auto()
    CRASHED = auto()  # fails instead after MAX_CRASHES


@dataclass(frozen=True)
class EngineExit:
    """The facts about an engine that has exited. `exit_code` is None if another worker started the
    engine; `exited_cleanly` says whether its last event is that of a saved checkpoint.
    """

    reasons: frozenset[StopReason]
    has_config: bool
    has_result: bool
    has_checkpoint: bool
    exited_cleanly: bool
    exit_code: int | None


@dataclass(frozen=True)
class Rule:
    """A row of the table. None matches every value."""

    action: ExitAction
    reason: StopReason | None = None
    has_config: bool | None = None
    has_result: bool | None = None
    has_checkpoint: bool | None = None
    exited_cleanly: bool | None = None
    exit_code: int | None = None

    def matches(self, engine_exit: EngineExit) -> bool:
        return (
            (self.reason is None or self.reason in engine_exit.reasons)
            and self.has_config in (None, engine_exit.has_config)
            and self.has_result in (None, engine_exit.has_result)
            and self.has_checkpoint in (None, engine_exit.has_checkpoint)
            and self.exited_cleanly in (None, engine_exit.exited_cleanly)
            and self.exit_code in (None, engine_exit.exit_code)
        )


# The first row that matches decides. A run that a user stopped and whose engine crashed after a
# checkpoint has no row of its own: it is queued again, and its next engine saves the adapter.
RULES = (
    Rule(ExitAction.RESULT, has_result=True),
    Rule(ExitAction.DISCARDED, StopReason.DISCARD),
    Rule(ExitAction.STOPPED_EMPTY, StopReason.STOP, has_checkpoint=False),
    Rule(ExitAction.STOPPED, StopReason.STOP, exited_cleanly=True),
    Rule(ExitAction.DISK_FULL, exit_code=EXIT_CODES[Outcome.DISK_FULL]),
    Rule(ExitAction.NO_CONFIG, has_config=False, exit_code=EXIT_CODES[Outcome.CONFIG_ERROR]),
    Rule(ExitAction.EVICTED, StopReason.EVICTION),
    Rule(ExitAction.OVER_MEMORY, StopReason.OVER_MEMORY),
    Rule(ExitAction.PAUSED, exited_cleanly=True),
    Rule(ExitAction.PAUSED, exit_code=EXIT_CODES[Outcome.PREEMPTED]),
    Rule(ExitAction.PAUSED_EARLY, StopReason.SIGTERM, exit_code=-signal.SIGTERM),
    Rule(ExitAction.FOLDER_BUSY, exit_code=EXIT_CODES[Outcome.BUSY]),
    Rule(ExitAction.CRASHED),
)


def classify_exit(engine_exit: EngineExit) -> ExitAction:
    return next(rule.action for rule in RULES if rule.matches(engine_exit))
