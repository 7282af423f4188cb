"""Child programs that read untrusted files: what they get to see of our environment, and how they
tell their progress.

No SECRET_KEY, no database, no tokens. A child prints one JSON object a line; its last words are its
result.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
PASSED_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "NVIDIA_", "CUDA_", "PYTORCH_")
# Every step has another shape. oneDNN keeps 1,024 of its programs with their buffers, and glibc
# raises its limit for blocks that go back to the system to 32 MB: SmolLM2-135M grew from 1.3 to 2.0
# GB over 40 steps, and with these stays at 1.5, as quick.
STEADY_MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "MALLOC_MMAP_THRESHOLD_": "4000000",
    "MALLOC_TRIM_THRESHOLD_": "128000000",
}
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NETWORK = (
    "HTTPS_PROXY",
    "https_proxy",
    "SSL_CERT_FILE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
)


def child_environment(*more: str) -> dict[str, str]:
    """The harmless part of this process' environment, and the variables named in `more` where they
    are set.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in (*PASSED_ON, *more) or name.startswith(PASSED_PREFIXES)
    } | {"PYTHONUNBUFFERED": "1"}


def end_with_parent() -> None:
    """Called in a child: even if its parent is killed, it gets SIGTERM and ends in order (Linux;
    elsewhere nothing is done).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_child(
    module: str, *arguments: str, cwd: Path, seconds: float, said: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end with `said` on its stdin. Raises subprocess.TimeoutExpired after
    `seconds`.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = child_environment()
    return subprocess.run(
        command,
        input=said,
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=cwd,
        env=environment,
        check=False,
    )


def follow_child(
    command: Sequence[str], log: Path, *, cwd: Path, environment: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Run a program and yield what it says. A program that dies without an error's words yields one
    for it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with log.open("w") as stderr:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=cwd, env=environment
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                said = json.loads(line)
                failed = failed or "error" in said
                yield said
        finally:
            if child.poll() is None:
                child.terminate()
            code = child.wait()
    if code and not failed:
        yield {
            "error": f"The program ended with code {code}; its log is "
            f"{log.parent.name}/{log.name} in SNAPML_HOME."
        }
