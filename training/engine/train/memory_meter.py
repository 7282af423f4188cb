"""Memory now and at its peak since the last look, in bytes: of the process on a CPU, of each
device's allocator on CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROC_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Reads memory; each `read` starts a new peak where the system allows it (Linux: writing 5 to
    clear_refs).
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
            # without the right to reset it, the peak is that of the whole run, which is still true
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
