"""`python -m training.engine RUN_DIR` trains with the settings in RUN_DIR/config.json. The exit
code is the outcome (outcome.py).

The process can be killed at any time. When it is started again on the same folder, it resumes from
the latest valid checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

from training.engine.config import RunConfig
from training.engine.data.errors import DataError
from training.engine.events import BrokenJournal, Journal
from training.engine.fast_imports import fast_imports
from training.engine.files import describe_storage_error, write_atomically
from training.engine.outcome import EXIT_CODES, Outcome, Result, read_result
from training.engine.stop_requests import StopRequests
from training.errors import ConfigError, convert_panics

ATTEMPT_FILE = "attempts"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "config.json").is_file():
        sys.stderr.write("usage: python -m training.engine RUN_DIR (must contain config.json)\n")
        return EXIT_CODES[Outcome.CONFIG_ERROR]
    run_dir = Path(arguments[0]).resolve()
    try:
        lock = acquire_lock(run_dir)
        if lock is None:
            return EXIT_CODES[Outcome.BUSY]
        return EXIT_CODES[run_engine(run_dir)]
    except OSError as error:
        # There is no place for a result, so the exit code and the log must tell
        message = describe_storage_error(error, run_dir)
        if message is None:
            raise
        traceback.print_exc()
        sys.stderr.write(f"{message}\n")
        return EXIT_CODES[Outcome.DISK_FULL]


def run_engine(run_dir: Path) -> Outcome:
    """Train unless the run has a result, and record the outcome. Raises OSError: it cannot be
    recorded.
    """
    result = read_result(run_dir)
    try:
        journal = Journal(run_dir)
    except BrokenJournal as error:
        result = result or Result(outcome=Outcome.FAULT, message=str(error))
        result.write_file(run_dir)
        return result.outcome
    if result is None:
        stop_requests = StopRequests(run_dir)
        stop_requests.install_handlers()
        result = run_training(run_dir, journal, stop_requests)
    if journal.last_kind != "end":
        journal.write_event("end", outcome=result.outcome, message=result.message, step=result.step)
    return result.outcome


def acquire_lock(run_dir: Path) -> TextIO | None:
    """Lock the folder, so that only one engine works in it; None if another engine has the lock.
    The kernel releases the lock when this process ends, even after SIGKILL.

    A process that checks for a running engine takes the lock briefly, so this retries for a second.
    """
    lock = (run_dir / "engine.lock").open("w")
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            (run_dir / "engine.json").write_text(json.dumps({"pid": os.getpid()}))
            return lock
    return None


def run_training(run_dir: Path, journal: Journal, stop_requests: StopRequests) -> Result:
    """Train, and turn every return and every exception into a result. result.json is written only
    if the outcome is final: a preempted or crashed run is started again.
    """
    with fast_imports():
        from training.engine.train.attempt import Attempt

    attempt = Attempt(run_dir, journal, number=count_attempt(run_dir))
    try:
        config = RunConfig.from_dict(json.loads((run_dir / "config.json").read_text()))
        with convert_panics():
            outcome, message = attempt.train_and_export(config, stop_requests)
    except (ConfigError, json.JSONDecodeError) as error:
        outcome, message = Outcome.CONFIG_ERROR, str(error)
    except DataError as error:
        outcome, message = Outcome.DATA_ERROR, str(error)
    # Every other error must reach the user, and this is the only place that can report it
    except Exception as error:  # noqa: BLE001
        outcome, message = attempt.classify_error(error)
        if outcome is Outcome.DISK_FULL:
            traceback.print_exc()
        else:
            journal.write_event("log", level="error", text=traceback.format_exc())
    result = attempt.build_result(outcome, message)
    if outcome not in (Outcome.PREEMPTED, Outcome.CRASHED):
        result.write_file(run_dir)
    return result


def count_attempt(run_dir: Path) -> int:
    """Count this start: 1 for the first one in this folder, then 2, and so on."""
    path = run_dir / ATTEMPT_FILE
    try:
        number = int(path.read_text()) + 1
    except FileNotFoundError:
        number = 1
    except ValueError:  # the file is damaged, so there was a start
        number = 2
    write_atomically(path, str(number))
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
