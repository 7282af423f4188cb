"""The device that trains, as its driver tells it. No torch here."""

from __future__ import annotations

from functools import lru_cache

import psutil


@lru_cache(maxsize=1)
def device_kind() -> str:
    """`cuda` where NVIDIA's driver finds a card, else `cpu`."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return "cuda" if pynvml.nvmlDeviceGetCount() else "cpu"
    except pynvml.NVMLError:  # no driver, no card, no permission: all mean that the CPU trains
        return "cpu"


@lru_cache(maxsize=1)
def device_name() -> str:
    """The first NVIDIA card's name, or what the CPU is."""
    if device_kind() == "cpu":
        return f"CPU, {psutil.cpu_count()} cores"
    import pynvml

    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


def device_memory() -> tuple[int, int]:
    """Bytes in all and free now, of the device that trains."""
    if device_kind() == "cpu":
        host = psutil.virtual_memory()
        return host.total, host.available
    import pynvml

    told = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    return int(told.total), int(told.free)
