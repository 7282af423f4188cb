"""The processes that `manage.py up` starts and restarts: web, worker and inference."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import CommandError

from training.child_process import child_environment, set_parent_death_signal

MANAGE_PY = str(settings.BASE_DIR / "manage.py")
# A process that ran this long before it died is restarted without a delay.
STABLE_SECONDS = 10.0
MAX_RESTART_DELAY = 10.0


class ManagedProcess:
    """A child process of `manage.py up`. It runs in its own session, so that Ctrl-C in the terminal
    reaches only the parent, which then stops its children in order.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        stop_timeout: float,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.stop_timeout = stop_timeout
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_delay = 0.0
        self.restart_at = 0.0

    def start(self) -> None:
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=settings.BASE_DIR,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=set_parent_death_signal,  # noqa: PLW1509 no threads yet
        )

    def restart_if_dead(self) -> None:
        """Restart a dead process: at once the first time, then after 0.5, 1, 2... 10 s while it
        keeps dying.
        """
        if self.process is not None:
            if self.process.poll() is None:
                return
            sys.stderr.write(
                f"{self.name} exited with code {self.process.returncode}; restarting it.\n"
            )
            is_stable = time.monotonic() - self.started_at > STABLE_SECONDS
            self.restart_delay = (
                0.0 if is_stable else min(max(0.5, 2 * self.restart_delay), MAX_RESTART_DELAY)
            )
            self.restart_at = time.monotonic() + self.restart_delay
            self.process = None
        if time.monotonic() >= self.restart_at:
            self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(self.stop_timeout)
        except subprocess.TimeoutExpired:
            sys.stderr.write(
                f"{self.name} did not exit within {self.stop_timeout:.0f} s; killing it.\n"
            )
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def build_processes(
    host: str, port: int, *, has_own_inference: bool = True
) -> list[ManagedProcess]:
    """Web, worker and, unless an external inference server is configured, inference. The worker's
    stop timeout covers one training step and a checkpoint.
    """
    server_arguments = [
        "-v",
        "0",
        "-b",
        host,
        "-p",
        str(port),
        "--no-server-name",
        "snapml_site.asgi:application",
    ]
    web = ManagedProcess(
        "web", [sys.executable, "-m", "snapml_site.web_server", *server_arguments], stop_timeout=10
    )
    worker = ManagedProcess("worker", [sys.executable, MANAGE_PY, "worker"], stop_timeout=180)
    if not has_own_inference:
        return [web, worker]
    inference_port = os.environ["INFERENCE_URL"].rsplit(":", 1)[1]
    command = [sys.executable, "-m", "adapters.inference", inference_port]
    environment = child_environment("INFERENCE_TOKEN")
    return [
        web,
        worker,
        ManagedProcess("inference", command, stop_timeout=10, environment=environment),
    ]


def acquire_lock() -> Any:
    """Allow one `up` per SNAPML_HOME. The kernel releases the lock when this process ends in any
    way.
    """
    lock = (Path(settings.HOME) / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CommandError(
            f"SnapML is already running on {settings.HOME}. Stop it, or set another SNAPML_HOME."
        ) from error
    return lock
