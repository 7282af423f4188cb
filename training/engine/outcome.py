"""The outcomes of a run and the engine's exit codes for them. Does not import torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from training.engine.files import write_atomically

RESULT_FILE = "result.json"


class Outcome(StrEnum):
    FINISHED = "finished"
    STOPPED = "stopped"  # by a user; the adapter is exported
    DISCARDED = "discarded"  # by a user; nothing is exported
    # By a signal or an expired heartbeat; a checkpoint is saved and training will resume
    PREEMPTED = "preempted"
    BUSY = "busy"  # another engine has the lock of this run folder
    CONFIG_ERROR = "config_error"
    DATA_ERROR = "data_error"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"  # or read-only, or the run's folder has vanished
    FAULT = "fault"  # an error that a retry would repeat
    CRASHED = "crashed"  # an error that a retry may not repeat, for example a lost device


# Codes of sysexits.h where one fits, otherwise numbers from 90.
EXIT_CODES: dict[Outcome, int] = {
    Outcome.FINISHED: 0,
    Outcome.STOPPED: 0,
    Outcome.DISCARDED: 0,
    Outcome.PREEMPTED: 75,
    Outcome.BUSY: 73,
    Outcome.CONFIG_ERROR: 78,
    Outcome.DATA_ERROR: 65,
    Outcome.CRASHED: 70,
    Outcome.DIVERGED: 90,
    Outcome.OUT_OF_MEMORY: 91,
    Outcome.DISK_FULL: 92,
    Outcome.FAULT: 93,
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of `result.json`. Losses are cross entropy in nats per trained token; None if
    never measured.
    """

    outcome: Outcome
    message: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    exact_match: float | None = None
    adapter_step: int | None = None
    trainable_parameters: int = 0
    total_tokens: int = 0

    def write_file(self, run_dir: Path) -> None:
        write_atomically(run_dir / RESULT_FILE, json.dumps(asdict(self), indent=1))


def read_result(run_dir: Path) -> Result | None:
    """The result of a run. None if it has none, or a damaged one: then the run resumes and writes
    another. Fields of other versions of SnapML are ignored.
    """
    try:
        values: dict[str, Any] = json.loads((run_dir / RESULT_FILE).read_text())
        known = {field.name: values[field.name] for field in fields(Result) if field.name in values}
        return Result(**known | {"outcome": Outcome(values["outcome"])})
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
