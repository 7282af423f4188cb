"""Start child programs and exchange messages with them.

A child prints one JSON object per line. `{"error": ...}` is a message for a person and ends the
child's work; the meaning of every other object is up to the two programs. Parameters are passed as
arguments, on stdin, or in `params.json` in a folder of the child's own. A child gets no SECRET_KEY,
no database address and no token.

Both sides of the protocol are here, so this module imports neither Django nor the engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError, convert_panics, find_storage_error

ALLOWED_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
ALLOWED_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "NVIDIA_", "CUDA_", "PYTORCH_")
# Every training step has a different shape. By default oneDNN caches 1,024 compiled kernels with
# their buffers, and glibc raises the size of blocks that it returns to the system to 32 MB. The
# memory of SmolLM2-135M then grows from 1.3 to 2.0 GB in 40 steps; with these settings it stays at
# 1.5 GB at the same speed.
ALLOCATOR_VARIABLES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "MALLOC_MMAP_THRESHOLD_": "4000000",
    "MALLOC_TRIM_THRESHOLD_": "128000000",
}
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NETWORK_VARIABLES = (
    "HTTPS_PROXY",
    "https_proxy",
    "SSL_CERT_FILE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
)
PARAMS_FILE = "params.json"
GIB = 2**30
UNSIGNED = 2**64 - 1  # makes RLIM_INFINITY, which is -1, the largest limit
KILL_AFTER_SECONDS = 10.0  # time for a child to clean up after SIGTERM
CANCEL_CHECK_SECONDS = 1.0
EXIT_USER_ERROR = 65  # EX_DATAERR of sysexits.h
EXIT_DISK = 74  # EX_IOERR
EXIT_TERMINATED = 128 + signal.SIGTERM

Message = dict[str, Any]
write_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """What a child may use. Above its address space Python raises MemoryError, above its CPU time
    the kernel ends it, and a larger file is an OSError.

    `counted_bytes` counts towards the limit of all programs of the host together: the address
    space without that of the libraries, most of which is never used.
    """

    address_space_bytes: int
    counted_bytes: int
    cpu_seconds: int = resource.RLIM_INFINITY
    file_bytes: int = resource.RLIM_INFINITY

    def apply(self, pid: int) -> None:
        for limit, value in (
            (resource.RLIMIT_AS, self.address_space_bytes),
            (resource.RLIMIT_CPU, self.cpu_seconds),
            (resource.RLIMIT_FSIZE, self.file_bytes),
        ):
            with suppress(ProcessLookupError):  # it has already exited
                # Only root may raise a limit that the child has inherited
                _soft, inherited = resource.prlimit(pid, limit)
                lower = min(value, inherited, key=lambda one: one & UNSIGNED)
                resource.prlimit(pid, limit, (lower, lower))


def get_model_program_limits(model_bytes: int) -> ProgramLimits:
    """The limits of a program that loads a model as float32 beside a second one, with its files
    mapped into memory: usually up to four times their size, but not always.
    """
    return ProgramLimits(
        address_space_bytes=8 * model_bytes + 8 * GIB, counted_bytes=4 * model_bytes + GIB
    )


# The parent's side.


def child_environment(*more: str) -> dict[str, str]:
    """The environment of a child: the variables that are safe to pass on, and those named in `more`
    if they are set.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in (*ALLOWED_VARIABLES, *more) or name.startswith(ALLOWED_PREFIXES)
    } | {"PYTHONUNBUFFERED": "1"}


def module_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def write_params(folder: Path, params: Message) -> None:
    """Write a child's parameters to the file that `read_params` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARAMS_FILE).write_text(json.dumps(params))


def read_messages(output: str) -> list[Message]:
    return [json.loads(line) for line in output.splitlines()]


def build_error(message: Message) -> UserError:
    """The error that a child sent with `emit_error`."""
    error = UserError(
        message["error"], field=message.get("field", ""), code=message.get("code", "")
    )
    error.status = message.get("status", error.status)
    return error


def run_child(
    module: str,
    *arguments: str,
    cwd: Path,
    seconds: float,
    limits: ProgramLimits,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a module until it exits, with `stdin` as its standard input.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `seconds` and was killed.
    """
    command = module_command(module, *arguments)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=child_environment(),
    ) as child:
        try:
            limits.apply(child.pid)
            stdout, stderr = child.communicate(stdin, timeout=seconds)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)


def stream_child(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environment: dict[str, str],
    limits: ProgramLimits,
    cancelled: threading.Event | None = None,
) -> Generator[Message, None, None]:
    """Run a program and yield its messages as they arrive. The program is terminated when the
    caller stops iterating or sets `cancelled`.

    Raises:
        UserError: the program reported an error, printed something that is not a message, or
            exited with a nonzero code.
    """
    log_hint = f"See the log in SNAPML_HOME/{log.parent.name}/{log.name}."
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=cwd, env=environment
        )
        assert child.stdout is not None
        if cancelled is not None:
            terminate_when_set(child, cancelled)
        try:
            limits.apply(child.pid)
            for line in child.stdout:
                try:
                    message = json.loads(line)
                except ValueError as error:
                    line_start = line.strip()[:80]
                    raise UserError(
                        f"The program printed {line_start!r} instead of a message. {log_hint}"
                    ) from error
                if "error" in message:
                    raise build_error(message)
                yield message
        finally:
            code = end_child(child)
            child.stdout.close()
    if code:
        raise UserError(f"The program exited with code {code}. {log_hint}")


def end_child(child: subprocess.Popen[str]) -> int:
    """Terminate a child that is still running, kill it if it does not exit, and return its exit
    code.
    """
    if child.poll() is None:
        child.terminate()
    try:
        return child.wait(KILL_AFTER_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def terminate_when_set(child: subprocess.Popen[str], cancelled: threading.Event) -> None:
    def wait_for_cancel() -> None:
        while child.poll() is None:
            if cancelled.wait(CANCEL_CHECK_SECONDS):
                end_child(child)

    threading.Thread(target=wait_for_cancel, name=f"cancel-{child.pid}", daemon=True).start()


class RequestProcess:
    """A program that answers one request per line. It is started for the first request and started
    again after it has exited: it exits by itself when it is idle.
    """

    def __init__(
        self,
        module: str,
        *,
        max_seconds: float,
        limits: ProgramLimits,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.module = module
        self.max_seconds = max_seconds
        self.limits = limits
        self.environment = environment or {}
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def send_request(self, message: Message, *, cwd: Path) -> Message | None:
        """The response; None if the program failed or took more than `max_seconds`.

        Raises:
            TimeoutError: earlier requests did not finish within `max_seconds`.
        """
        if not self._lock.acquire(timeout=self.max_seconds):
            raise TimeoutError
        try:
            return self._exchange(message, cwd)
        finally:
            self._lock.release()

    def _exchange(self, message: Message, cwd: Path) -> Message | None:
        # A child that is exiting because it is idle may still look alive. In that case, start a new
        # one and send the request again.
        for _ in range(2):
            child = self._ensure_child(cwd)
            started = time.monotonic()
            timer = threading.Timer(self.max_seconds, child.kill)
            timer.start()
            try:
                line = self._exchange_line(child, json.dumps(message))
            finally:
                timer.cancel()
            if line.endswith("\n"):  # otherwise it was killed while it was writing
                response: Message = json.loads(line)
                return response
            self._child = None
            if time.monotonic() - started > self.max_seconds:
                break
        return None

    @staticmethod
    def _exchange_line(child: subprocess.Popen[str], line: str) -> str:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            return child.stdout.readline()
        except OSError:  # it has exited
            return ""

    def _ensure_child(self, cwd: Path) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", *module_command(self.module)[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=cwd,
                env=child_environment() | self.environment,
            )
            self.limits.apply(self._child.pid)
            # It may exit at any time. Without a thread that waits for it, it would stay a zombie.
            threading.Thread(target=self._child.wait, name="reap-child", daemon=True).start()
        return self._child


# The child's side.


def set_parent_death_signal() -> None:
    """Called in a child: send SIGTERM to this process when its parent dies, even if the parent is
    killed. Linux only; a no-op elsewhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def emit_message(**message: Any) -> None:
    with write_lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def emit_error(error: UserError) -> None:
    emit_message(error=error.message, field=error.field, code=error.code, status=error.status)


def read_params() -> Message:
    """The parameters that the parent wrote with `write_params`, in the folder that is the last
    argument.
    """
    params: Message = json.loads((Path(sys.argv[-1]) / PARAMS_FILE).read_text())
    return params


def main(run_program: Callable[[], None]) -> int:
    """Run a child program and return its exit code. Errors that a person can fix are sent as
    messages.
    """
    # On SIGTERM the program cleans up. It also gets SIGTERM when its worker dies; otherwise a
    # second program would soon write to the same files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    set_parent_death_signal()
    try:
        with convert_panics():
            run_program()
    except UserError as error:
        emit_error(error)
        return EXIT_USER_ERROR
    except Exception as error:
        storage_error = find_storage_error(error)
        if storage_error:
            emit_error(storage_error)
            return EXIT_DISK
        if not isinstance(error, OSError) or error.errno is None or error.filename is None:
            raise
        name = Path(str(error.filename)).name
        emit_error(UserError(f"{name} could not be read or written: {os.strerror(error.errno)}."))
        return EXIT_DISK
    return 0
