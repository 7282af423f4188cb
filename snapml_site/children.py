"""The three programs that `manage.py up` keeps alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from django.conf import settings

from training.child_process import child_environment, set_parent_death_signal

MANAGE = str(settings.BASE_DIR / "manage.py")
# A child that lived this long died of something new: its next start is at once again.
STEADY_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 10.0


class Child:
    """A program in a session of its own, so that the terminal's Ctrl-C reaches only the parent,
    which then stops in order.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        patience_seconds: float,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.patience_seconds = patience_seconds
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.wait_seconds = 0.0
        self.again_at = 0.0

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

    def start_again_if_dead(self) -> None:
        """At once the first time, then after 0.5, 1, 2... 10 s while it keeps dying."""
        if self.process is not None:
            if self.process.poll() is None:
                return
            sys.stderr.write(
                f"{self.name} ended with code {self.process.returncode}; starting it again.\n"
            )
            steady = time.monotonic() - self.started_at > STEADY_SECONDS
            self.wait_seconds = (
                0.0 if steady else min(max(0.5, 2 * self.wait_seconds), LONGEST_WAIT_SECONDS)
            )
            self.again_at = time.monotonic() + self.wait_seconds
            self.process = None
        if time.monotonic() >= self.again_at:
            self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(self.patience_seconds)
        except subprocess.TimeoutExpired:
            sys.stderr.write(
                f"{self.name} did not end within {self.patience_seconds:.0f} s and is killed.\n"
            )
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def engine_room(host: str, port: int, *, own_inference: bool = True) -> list[Child]:
    """Web, worker and, unless another server answers, inference. The worker's patience covers a
    step and a checkpoint.
    """
    served = [
        "-v",
        "0",
        "-b",
        host,
        "-p",
        str(port),
        "--no-server-name",
        "snapml_site.asgi:application",
    ]
    web = Child("web", [sys.executable, "-m", "snapml_site.web", *served], patience_seconds=10)
    worker = Child("worker", [sys.executable, MANAGE, "worker"], patience_seconds=180)
    if not own_inference:
        return [web, worker]
    port_of_inference = os.environ["INFERENCE_URL"].rsplit(":", 1)[1]
    command = [sys.executable, "-m", "adapters.inference", port_of_inference]
    environment = child_environment("INFERENCE_TOKEN")
    return [web, worker, Child("inference", command, patience_seconds=10, environment=environment)]
