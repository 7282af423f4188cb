"""Errors of the machine: its memory, devices and disks. They say nothing about the settings, the
model or the data.
"""

from __future__ import annotations

import errno
import re

import torch

from training.errors import find_storage_error, get_errno

# Errors of a device or a network folder that may not occur again at the next start
TRANSIENT_ERRNOS = frozenset(
    {
        *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ECONNRESET, errno.EPIPE),
    }
)
DEVICE_ERROR = re.compile(r"\b(CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|NCCL|HIP)\b|nvidia|NVML")
# CUDA's checks of indices: a token or position that the model does not have
DEVICE_ASSERT = "device-side assert"
# Errors of a device that the same model and settings cause again
REPEATED_DEVICE_ERROR = re.compile(
    rf"{DEVICE_ASSERT}|no kernel image is available|STATUS_(NOT_SUPPORTED|ARCH_MISMATCH)"
)
HOST_OUT_OF_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or get_errno(error) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(t in str(error) for t in HOST_OUT_OF_MEMORY))
    )


def is_transient(error: Exception) -> bool:
    """Whether a new start may succeed: an error of a device or of the system, but not of the code,
    the model or the data, which are the same again.
    """
    if isinstance(error, RuntimeError):
        text = str(error)
        return bool(DEVICE_ERROR.search(text)) and not REPEATED_DEVICE_ERROR.search(text)
    return get_errno(error) in TRANSIENT_ERRNOS


def is_host_error(error: Exception) -> bool:
    """Whether this is an error of the machine, which must not be reported as wrong settings."""
    return is_out_of_memory(error) or is_transient(error) or find_storage_error(error) is not None
