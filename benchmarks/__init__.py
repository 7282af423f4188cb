"""Benchmarks. Each script prints its figures as text, or with --json as one JSON object on the last
line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def print_report(figures: dict[str, Any]) -> None:
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>24}  {format_figure(value)}")


def format_figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
    return str(value)


def estimator_device(device: torch.device) -> str:
    """The device kind that a memory estimator is built for, given a device of this machine."""
    import torch

    from training.engine.modeling.model import get_fastest_dtype

    return "cpu_fp32" if get_fastest_dtype(device) is torch.float32 else device.type


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a `share` of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
