"""The launch form, made of the engine's own config class: its fields, sentences, ranges and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.engine.config import LIMITS, RunConfig
from training.runs.launch import OWN_SETTINGS

TITLES = {
    "max_grad_norm": "Gradient clipping",
    "train_on_prompt": "Train on the prompt",
    "tokens_per_batch": "Tokens per batch",
    "eval_interval": "Evaluate every",
    "eval_rows": "Held-out rows",
    "save_interval": "Save every",
    "max_steps": "Most steps",
    "warmup_ratio": "Warm-up share",
    "max_length": "Longest row",
    "threads": "CPU threads",
    "batch_by": "Batches are counted in",
    "rows_per_batch": "Rows per batch",
    "early_stopping": "Early stopping",
}
GROUPS = (
    ("LoRA", ("rank", "alpha", "dropout", "target_modules")),
    ("Training", ("learning_rate", "epochs", "max_steps", "tokens_per_batch", "max_length")),
    ("Batches", ("batch_by", "rows_per_batch", "accumulation", "packing")),
    ("Schedule", ("schedule", "warmup_ratio", "weight_decay", "max_grad_norm")),
    ("Measuring and saving", ("eval_interval", "eval_rows", "save_interval", "early_stopping", "final_weights")),
    ("Machine", ("train_on_prompt", "precision", "gradient_checkpointing", "seed", "threads")),
)


@dataclass(frozen=True)
class Field:
    name: str
    title: str
    kind: str
    value: Any
    words: str
    usual: str
    choices: tuple[str, ...]
    advanced: bool
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """The value as one types it; several values of a sweep with commas."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return ", ".join(map(str, values))


def title(name: str) -> str:
    """A setting's name as the page writes it."""
    return TITLES.get(name, name.replace("_", " ").capitalize()) if name else "the settings"


def fields(values: Mapping[str, Any]) -> dict[str, Field]:
    """Every setting a person may turn, with the given value or its default."""
    limits = {name: (low, high) for name, low, high in LIMITS}
    made = {}
    for f in dataclasses.fields(RunConfig):
        if f.name in OWN_SETTINGS or f.name == "method":
            continue
        low, high = limits.get(f.name, (None, None))
        made[f.name] = Field(
            name=f.name,
            title=title(f.name),
            kind=str(f.type),
            value=values.get(f.name, f.default),
            words=f.metadata["words"],
            usual=f.metadata["usual"],
            choices=f.metadata["choices"],
            advanced=f.metadata["advanced"],
            low=low,
            high=high,
        )
    return made


def groups(values: Mapping[str, Any], *, advanced: bool) -> list[tuple[str, list[Field]]]:
    """Fields under their headings, either those in view or those behind the fold."""
    known = fields(values)
    made = [(title, [known[name] for name in names if known[name].advanced == advanced]) for title, names in GROUPS]
    return [(title, members) for title, members in made if members]


def settings_from(posted: Mapping[str, str]) -> dict[str, Any]:
    """Form text -> typed settings; numbers with commas become a list, which makes a sweep.

    What cannot be read as a number stays text, and the config class refuses it by name.
    """
    settings: dict[str, Any] = {}
    for name, field in fields({}).items():
        if field.kind == "bool":
            settings[name] = posted.get(name) == "on"
        elif name in posted:
            parts = posted[name].split(",") if field.kind in ("int", "float") else [posted[name]]
            values = [typed(part.strip(), field.kind) for part in parts if part.strip()] or [""]
            settings[name] = values if len(values) > 1 else values[0]
    return settings


def typed(text: str, kind: str) -> Any:
    readers = {"int": int, "float": float}
    try:
        return readers[kind](text) if kind in readers else text
    except ValueError:
        return text
