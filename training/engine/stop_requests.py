"""Requests to stop the engine: a signal, a file, or an expired heartbeat.

- SIGTERM or SIGINT: save a checkpoint and exit; training resumes later.
- File `stop` in the run folder: a user stops the run. Its text is `save` or `discard`.
- File `heartbeat`: the supervising worker touches it every 5 s. If it is older than 20 s, the
  worker is dead or disconnected, and the engine saves a checkpoint and exits. That is before the
  run's lease (30 s) expires, so another engine can start safely. A run started from a shell has no
  such file and needs no heartbeat.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from training.engine.outcome import Outcome

HEARTBEAT_FILE = "heartbeat"
HEARTBEAT_TIMEOUT = 20.0  # seconds
STOP_FILE = "stop"


class StopRequests:
    """Stop requests of one run. `main` creates it in the main thread, where signal handlers can be
    installed, and the training loop polls it before every step.
    """

    def __init__(self, run_dir: Path) -> None:
        self._heartbeat_path = run_dir / HEARTBEAT_FILE
        self._stop_path = run_dir / STOP_FILE
        self._is_signaled = False

    def install_handlers(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def get_requested_stop(self) -> Outcome | None:
        """Return the outcome to end with now, or None to continue. Takes two `stat` calls, 4 us."""
        if self._stop_path.exists():
            return (
                Outcome.DISCARDED
                if self._stop_path.read_text().strip() == "discard"
                else Outcome.STOPPED
            )
        if self._is_signaled or self._is_heartbeat_expired():
            return Outcome.PREEMPTED
        return None

    def _is_heartbeat_expired(self) -> bool:
        try:
            return time.time() - self._heartbeat_path.stat().st_mtime > HEARTBEAT_TIMEOUT
        except FileNotFoundError:
            return False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._is_signaled = True
