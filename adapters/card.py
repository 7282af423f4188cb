"""The card that goes with an adapter: what it was made from and how, as Markdown with the hub's header. It knows no torch."""

from __future__ import annotations

from typing import Any

import yaml

from training.engine.methods import TABLE
from training.runs.models import Run

NAME = "README.md"


def card_of(run: Run, *, step: int, heldout_loss: float | None) -> str:
    """Markdown; the header is what model hubs read."""
    method = TABLE[run.method]
    base = run.base_model.name
    header: dict[str, Any] = {"base_model": base, "tags": ["snapml", run.method]}
    if not method.whole_model:
        header["library_name"] = "peft"
    measured = "" if heldout_loss is None else f", held-out loss {heldout_loss:.4f}"
    rows = f"{run.data.train_rows:,} rows"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(run.name)}",
        f"{method.title} of {plain(base)} on {plain(str(run.data))} ({rows}), from step {step:,}{measured}.",
        "## Settings",
        "\n".join(f"- {name}: {plain(str(value))}" for name, value in run.config.items()),
    ]
    if run.advice:
        lines += ["## The plan", "Auto LLM chose these; what was rejected stands behind each reason.", planned(run.advice)]
    return "\n\n".join(lines) + "\n"


def planned(advice: dict[str, Any]) -> str:
    told = (f"- **{one['setting']} = {plain(str(one['value']))}**: {one['why']} {one['instead']}" for one in advice["choices"])
    return "\n".join(line.rstrip() for line in told)


def plain(text: str) -> str:
    """A name that people wrote, as text: nothing in it opens Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text.replace("\n", " "))
