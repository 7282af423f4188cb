"""What a program that reads untrusted files gets to see of our environment: no SECRET_KEY, no database, no tokens."""

import os

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
PASSED_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "NVIDIA_", "CUDA_", "PYTORCH_")


def child_environment(*more: str) -> dict[str, str]:
    """The harmless part of this process' environment, and the variables named in `more` where they are set."""
    return {
        name: value for name, value in os.environ.items() if name in (*PASSED_ON, *more) or name.startswith(PASSED_PREFIXES)
    } | {"PYTHONUNBUFFERED": "1"}
