"""Runs side by side: which settings differ, and who is best at what. Pure: rows in, tables out; it
knows no ORM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST = 10
# Figures of a run and which way is better: "low", "high", or neither.
FIGURES: tuple[tuple[str, str, str], ...] = (
    ("best_heldout_loss", "Best held-out loss", "low"),
    ("perplexity", "Perplexity of that", "low"),
    ("exact_match", "Answers word for word right", "high"),
    ("heldout_loss", "Last held-out loss", "low"),
    ("loss", "Last training loss", "low"),
    ("peak_memory_bytes", "Peak memory", "low"),
    ("tokens_per_second", "Tokens per second", "high"),
    ("trainable_parameters", "Trainable parameters", "low"),
    ("step", "Steps", ""),
    ("device_seconds", "Time on devices", "low"),
)

# A token of another base is another piece of text, so that these tell nothing across bases.
PER_TOKEN = {"best_heldout_loss", "perplexity", "heldout_loss", "loss", "mean_perplexity"}


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
    runs: Sequence[dict[str, Any]], shown: Sequence[tuple[str, str, str]] = FIGURES
) -> list[tuple[str, str, list[tuple[Any, bool]]]]:
    """(name, title, [(value, best?)]) for every figure that at least one run has. Equal values
    share the mark.

    Of what counts by token none is the best where the bases differ (`base` of each run).
    """
    table = []
    alike = len({run.get("base") for run in runs}) == 1
    for name, title, way in shown:
        better = way if alike or name not in PER_TOKEN else ""
        values = [run.get(name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = (min if better == "low" else max)(known) if better and len(set(known)) > 1 else None
        table.append(
            (name, title, [(value, best is not None and value == best) for value in values])
        )
    return table
