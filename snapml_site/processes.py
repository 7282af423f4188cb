"""The processes that `manage.py up` starts and restarts: web, worker and inference."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
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
# A process that does not answer for this long is stuck in one operation that holds Python's lock
STUCK_SECONDS = 15.0
HEALTH_CHECK_SECONDS = 3.0  # between two requests


class HealthCheck:
    """Asks a server on this host for `/health`. It never blocks, and has no thread because `up`
    forks processes.
    """

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)
        self.connection: socket.socket | None = None
        self.sent_at = 0.0

    def is_stuck(self) -> bool:
        """Whether the last request has not been answered for STUCK_SECONDS. Sends the next one."""
        waited = time.monotonic() - self.sent_at
        if self.connection is None:
            if waited > HEALTH_CHECK_SECONDS:
                self._send_request()
            return False
        try:
            self.connection.recv(1)
        except BlockingIOError:
            return waited > STUCK_SECONDS
        except OSError:
            pass  # it has exited
        self.close()
        return False

    def _send_request(self) -> None:
        self.sent_at = time.monotonic()
        try:  # the kernel accepts it, even if the process is stuck
            self.connection = socket.create_connection(self.address, timeout=1.0)
            self.connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.connection.setblocking(False)
        except OSError:
            self.close()  # it is starting

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


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
        health_check: HealthCheck | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.stop_timeout = stop_timeout
        self.environment = environment
        self.health_check = health_check
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

    def kill_if_stuck(self) -> None:
        """Kill a process that does not answer, which ends its requests with an error."""
        if self.process is None or self.health_check is None or not self.health_check.is_stuck():
            return
        sys.stderr.write(f"{self.name} does not respond; killing it.\n")
        self.health_check.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

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
    inference = ManagedProcess(
        "inference",
        [sys.executable, "-m", "adapters.inference", inference_port],
        stop_timeout=10,
        environment=child_environment("INFERENCE_TOKEN"),
        health_check=HealthCheck(int(inference_port)),
    )
    return [web, worker, inference]


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
