"""The engine as a process of this host: start it, find it again, ask it to stop. Without database
access.

An engine has a lock on `engine.lock`, which the kernel releases however it exits. The lock tells
whether the engine is alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from django.conf import settings

from training.child_process import ALLOCATOR_VARIABLES, child_environment
from training.engine.stop_requests import HEARTBEAT_FILE, STOP_FILE


class Engine(Protocol):
    """The interface of the engine that the supervisor uses."""

    @property
    def exit_code(self) -> int | None: ...

    @property
    def was_oom_killed(self) -> bool: ...

    @property
    def pid(self) -> int | None: ...

    def start_process(self, device_environment: dict[str, str]) -> None: ...

    def is_alive(self) -> bool: ...

    def touch_heartbeat(self) -> None: ...

    def request_stop(self, mode: str) -> None: ...

    def send_signal(self, number: signal.Signals) -> None: ...


class EngineProcess:
    """The engine process of one run folder. `exit_code` stays None for an engine that another
    worker started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._oom_kills_before = 0

    def start_process(self, device_environment: dict[str, str]) -> None:
        """Start the engine in a session of its own, so that signals to the worker's process group
        do not reach it. `device_environment` selects its device.
        """
        with (self.folder / "engine.log").open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "training.engine", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=settings.BASE_DIR,
                env=child_environment()
                | ALLOCATOR_VARIABLES
                | {"HF_HUB_OFFLINE": "1"}
                | device_environment,
                start_new_session=True,
            )

    def is_alive(self) -> bool:
        if self._child is not None and self._child.poll() is None:
            return True
        return is_locked(self.folder / "engine.lock")

    @property
    def exit_code(self) -> int | None:
        return self._child.poll() if self._child is not None else None

    def touch_heartbeat(self) -> None:
        self._oom_kills_before = count_oom_kills()
        (self.folder / HEARTBEAT_FILE).touch()

    def request_stop(self, mode: str) -> None:
        """`mode` is `save` or `discard`. The engine checks for requests after every step."""
        (self.folder / STOP_FILE).write_text(mode)

    def send_signal(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid and self.is_alive():
            try:
                os.killpg(pid, number)  # start_new_session made it the leader of its group
            except ProcessLookupError:
                pass  # it exited after the check

    @property
    def was_oom_killed(self) -> bool:
        """Whether it died of SIGKILL and Linux has killed a process for lack of memory since the
        last heartbeat, a few seconds ago.
        """
        return self.exit_code == -signal.SIGKILL and count_oom_kills() > self._oom_kills_before

    @property
    def pid(self) -> int | None:
        if self._child is not None:
            return self._child.pid
        try:
            return int(json.loads((self.folder / "engine.json").read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return None


def count_oom_kills() -> int:
    """How often Linux has killed a process of this host for lack of memory, inside or outside
    containers; 0 if unknown.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_locked(path: Path) -> bool:
    """Whether a running process holds the lock. The check takes a shared lock for an instant; the
    engine retries for a second.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)
