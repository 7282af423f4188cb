"""The card that goes with an adapter: what it was made from and how, as Markdown with the hub's
header. It knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from training.engine.methods import METHODS
from training.formatting import format_bytes
from training.runs.models import Run

NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of the weights of one step. Losses in nats a trained token."""

    step: int
    eval_loss: float | None = None
    exact_match: float | None = None
    trainable_parameters: int = 0


def card_of(run: Run, measured: Measured) -> str:
    """Markdown; the header is what model hubs read."""
    method = METHODS[run.method]
    base = run.base_model.name
    header: dict[str, Any] = {"base_model": base, "tags": ["snapml", run.method]}
    if not method.is_full_finetuning:
        header["library_name"] = "peft"
    rows = f"{run.data.train_rows:,} rows"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(run.name)}",
        f"{method.title} of {plain(base)} on {plain(str(run.data))} ({rows}), from step "
        f"{measured.step:,}.",
        "## Figures",
        figures(run, measured),
        "## Settings",
        "\n".join(f"- {name}: {plain(str(value))}" for name, value in run.config.items()),
    ]
    if run.advice:
        lines += [
            "## The plan",
            "Auto LLM chose these; what was rejected stands behind each reason.",
            planned(run.advice),
        ]
    return "\n\n".join(lines) + "\n"


def card_for_hub(card: str, base: str, *, merged: bool) -> str:
    """The card with the header that a hub takes: it refuses a base that is not one of its own ids,
    so `base` is one or empty.
    """
    _, header, text = card.split("---\n", 2)
    told = yaml.safe_load(header)
    told.pop("base_model", None)
    if base:
        told |= {
            "base_model": base,
            "base_model_relation": "finetune"
            if merged or "library_name" not in told
            else "adapter",
        }
    if merged or "library_name" not in told:
        told["library_name"] = "transformers"
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}---\n{text}"


def figures(run: Run, measured: Measured) -> str:
    """What was measured, and with what it was made."""
    told = {
        "Held-out loss": None
        if measured.eval_loss is None
        else f"{measured.eval_loss:.4f} nats a trained token",
        "Held-out answers word for word right": None
        if measured.exact_match is None
        else f"{measured.exact_match:.1%}",
        "Trained parameters": f"{measured.trainable_parameters:,}"
        if measured.trainable_parameters
        else None,
        "Peak memory": format_bytes(run.peak_memory_bytes or None, 2) or None,
        "Base revision": run.base_model.revision or None,
        "Data": f"SHA-256 {run.data.digest}",
        "Device": run.plan.get("device"),
        "Libraries": ", ".join(
            f"{name} {version}" for name, version in run.plan.get("versions", {}).items()
        )
        or None,
    }
    return "\n".join(f"- {name}: {plain(str(value))}" for name, value in told.items() if value)


def planned(advice: dict[str, Any]) -> str:
    told = (
        f"- **{one['setting']} = {plain(str(one['value']))}**: {one['why']} {one['instead']}"
        for one in advice["choices"]
    )
    return "\n".join(line.rstrip() for line in told)


def plain(text: str) -> str:
    """A name that people wrote, as text: nothing in it opens Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text.replace("\n", " "))
