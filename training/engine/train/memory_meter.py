"""Current memory and its peak since the last reading, in bytes.

On a CPU it is the memory of the process, on CUDA that of each device's allocator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROC_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Reads memory. Each `read_memory` resets the peak where the system allows it (on Linux by
    writing 5 to clear_refs).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def read_memory(self) -> dict[str, Any]:
        return self._read_cuda() if self.device.type == "cuda" else self._read_process()

    def _read_process(self) -> dict[str, Any]:
        lines = dict(
            line.split(":", 1)
            for line in PROC_STATUS.read_text().splitlines()
            if line.startswith("Vm")
        )
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            # Without permission to reset it, the peak covers the whole run, which is still correct
            pass
        return {"memory_bytes": now, "memory_peak_bytes": max(now, peak)}

    def _read_cuda(self) -> dict[str, Any]:
        devices = []
        for index in range(torch.cuda.device_count()):
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "allocated_bytes": torch.cuda.memory_allocated(index),
                    "reserved_bytes": torch.cuda.memory_reserved(index),
                    "peak_bytes": torch.cuda.max_memory_allocated(index),
                }
            )
            torch.cuda.reset_peak_memory_stats(index)
        return {
            "memory_bytes": sum(d["allocated_bytes"] for d in devices),
            "memory_peak_bytes": sum(d["peak_bytes"] for d in devices),
            "devices": devices,
        }
