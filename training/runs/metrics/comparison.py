"""Compare runs: which settings differ, and which run has the best figures. Pure functions without
the ORM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from training.engine.metrics import METRICS, Figure

MAX_COMPARED_RUNS = 10
FIGURES: tuple[Figure, ...] = (
    replace(METRICS["eval_loss"], name="best_eval_loss", title="Best held-out loss"),
    replace(METRICS["perplexity"], title="Best perplexity"),
    Figure("exact_match", "Exact match", "share", "high"),
    replace(METRICS["eval_loss"], title="Last held-out loss"),
    replace(METRICS["loss"], title="Last training loss"),
    replace(METRICS["memory_peak_bytes"], name="peak_memory_bytes"),
    METRICS["tokens_per_second"],
    Figure("trainable_parameters", "Trainable parameters", better="low"),
    Figure("step", "Steps"),
    Figure("device_seconds", "Time on devices", "seconds", "low"),
)


def flatten_dict(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flattened |= flatten_dict(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = value
    return flattened


def compare_settings(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """(name, value of each run, whether they differ), in the order of the names' first
    occurrence.
    """
    flattened = [flatten_dict(one) for one in settings]
    names = list(dict.fromkeys(name for one in flattened for name in one))
    rows = [(name, [one.get(name) for one in flattened]) for name in names]
    return [(name, values, any(value != values[0] for value in values)) for name, values in rows]


def compare_figures(
    runs: Sequence[dict[str, Any]], figures: Sequence[Figure] = FIGURES
) -> list[tuple[Figure, list[tuple[Any, bool]]]]:
    """(figure, [(value, is best)]) for every figure that at least one run has. Runs with equal best
    values are all marked, unless all runs are equal.

    Figures per token have no best value if the base models differ (`base` of each run).
    """
    table = []
    is_same_base = len({run.get("base") for run in runs}) == 1
    for figure in figures:
        better = figure.better if is_same_base or not figure.is_per_token else ""
        values = [run.get(figure.name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = (min if better == "low" else max)(known) if better and len(set(known)) > 1 else None
        table.append((figure, [(value, best is not None and value == best) for value in values]))
    return table
