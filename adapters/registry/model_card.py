"""The model card of an adapter: Markdown with the Hub's YAML header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from training.engine.methods import METHODS
from training.formatting import format_bytes
from training.runs.models import Run

CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Evaluation of the weights at one step. Losses in nats per trained token."""

    step: int
    eval_loss: float | None = None
    exact_match: float | None = None
    trainable_parameters: int = 0


def build_card(run: Run, eval_result: EvalResult) -> str:
    """The card as Markdown with a YAML header for model hubs."""
    method = METHODS[run.method]
    base = run.base_model.name
    header: dict[str, Any] = {"base_model": base, "tags": ["snapml", run.method]}
    if not method.is_full_finetuning:
        header["library_name"] = "peft"
    rows = f"{run.data.train_rows:,} rows"
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {escape_markdown(run.name)}",
        f"{method.title} of {escape_markdown(base)} on {escape_markdown(str(run.data))} "
        f"({rows}), step {eval_result.step:,}.",
        "## Results",
        format_figures(run, eval_result),
        "## Settings",
        "\n".join(f"- {name}: {escape_markdown(str(value))}" for name, value in run.config.items()),
    ]
    if run.auto_plan:
        lines += [
            "## Why these settings",
            "Auto LLM chose these settings. Each reason is followed by the rejected alternative.",
            format_plan(run.auto_plan),
        ]
    return "\n\n".join(lines) + "\n"


def format_card_for_hub(card: str, base: str, *, merged: bool) -> str:
    """The card with a header that the Hub accepts. The Hub rejects a base model that is not one of
    its own IDs, so `base` is such an ID or empty.
    """
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    metadata.pop("base_model", None)
    if base:
        metadata |= {
            "base_model": base,
            "base_model_relation": "finetune"
            if merged or "library_name" not in metadata
            else "adapter",
        }
    if merged or "library_name" not in metadata:
        metadata["library_name"] = "transformers"
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{text}"


def format_figures(run: Run, eval_result: EvalResult) -> str:
    """Eval results and the environment they were measured in, as a Markdown list."""
    values = {
        "Held-out loss": None
        if eval_result.eval_loss is None
        else f"{eval_result.eval_loss:.4f} nats per trained token",
        "Exact match on held-out data": None
        if eval_result.exact_match is None
        else f"{eval_result.exact_match:.1%}",
        "Trained parameters": f"{eval_result.trainable_parameters:,}"
        if eval_result.trainable_parameters
        else None,
        "Peak memory": format_bytes(run.peak_memory_bytes or None, 2) or None,
        "Base revision": run.base_model.revision or None,
        "Data": f"SHA-256 {run.data.digest}",
        "Device": run.start_info.get("device"),
        "Libraries": ", ".join(
            f"{name} {version}" for name, version in run.start_info.get("versions", {}).items()
        )
        or None,
    }
    return "\n".join(
        f"- {name}: {escape_markdown(str(value))}" for name, value in values.items() if value
    )


def format_plan(auto_plan: dict[str, Any]) -> str:
    lines = (
        f"- **{one['setting']} = {escape_markdown(str(one['value']))}**: {one['why']} "
        f"{one['alternative']}"
        for one in auto_plan["choices"]
    )
    return "\n".join(line.rstrip() for line in lines)


def escape_markdown(text: str) -> str:
    """Escape text from users so that it cannot open Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in text.replace("\n", " "))
