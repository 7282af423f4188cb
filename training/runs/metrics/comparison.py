"""Runs side by side: which settings differ, and who is best at what. Pure: rows in, tables out; it
knows no ORM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from training.engine.metrics import METRICS, Figure

MOST = 10
FIGURES: tuple[Figure, ...] = (
    replace(METRICS["eval_loss"], name="best_eval_loss", title="Best held-out loss"),
    replace(METRICS["perplexity"], title="Perplexity of that"),
    Figure("exact_match", "Answers word for word right", "share", "high"),
    replace(METRICS["eval_loss"], title="Last held-out loss"),
    replace(METRICS["loss"], title="Last training loss"),
    replace(METRICS["memory_peak_bytes"], name="peak_memory_bytes"),
    METRICS["tokens_per_second"],
    Figure("trainable_parameters", "Trainable parameters", better="low"),
    Figure("step", "Steps"),
    Figure("device_seconds", "Time on devices", "seconds", "low"),
)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def differences(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """(name, value of each run, differs?) in the order in which the names first occur."""
    flats = [flat(one) for one in settings]
    names = list(dict.fromkeys(name for one in flats for name in one))
    rows = [(name, [one.get(name) for one in flats]) for name in names]
    return [(name, values, any(value != values[0] for value in values)) for name, values in rows]


def figures(
    runs: Sequence[dict[str, Any]], shown: Sequence[Figure] = FIGURES
) -> list[tuple[Figure, list[tuple[Any, bool]]]]:
    """(figure, [(value, best?)]) for every figure that at least one run has. Equal values share the
    mark.

    Of what counts by token none is the best where the bases differ (`base` of each run).
    """
    table = []
    alike = len({run.get("base") for run in runs}) == 1
    for figure in shown:
        better = figure.better if alike or not figure.is_per_token else ""
        values = [run.get(figure.name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = (min if better == "low" else max)(known) if better and len(set(known)) > 1 else None
        table.append((figure, [(value, best is not None and value == best) for value in values]))
    return table
