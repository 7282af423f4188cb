"""The launch form, generated from RunConfig: fields, descriptions and ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.settings import PAPERS
from training.runs.launch.services import INTERNAL_SETTINGS

TITLES = {
    "max_grad_norm": "Gradient clipping",
    "max_tokens_per_batch": "Tokens per batch",
    "eval_steps": "Evaluate every",
    "eval_rows": "Held-out rows",
    "micro_batch_splits": "Micro-batches per batch",
    "auto_reduce_memory": "Recover from out of memory",
    "save_steps": "Save every",
    "threads": "CPU threads",
    "excluded_eval_rows": "Excluded held-out rows",
    "lr_scheduler_type": "Learning rate schedule",
    "optim": "Optimizer",
    "export_checkpoint": "Checkpoint to export",
    "gradient_accumulation_steps": "Gradient accumulation",
    "num_virtual_tokens": "Virtual tokens",
    "per_device_train_batch_size": "Rows per batch",
    "early_stopping_patience": "Early stopping",
    "init_lora_weights": "Initialization",
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "loraplus_lr_ratio": "LoRA+ ratio",
    "rank_pattern": "Rank by layer",
    "alpha_pattern": "Alpha by layer",
    "prompt_tuning_init": "Initialize prompt from",
    "prompt_tuning_init_text": "Initial prompt text",
    "tuning_budget_fraction": "Tuning budget",
    "tuning_budget_minutes": "Tuning budget, minutes",
}
GROUPS = (
    ("Training", ("learning_rate", "epochs", "max_steps", "max_tokens_per_batch", "max_length")),
    (
        "Batches",
        (
            "batch_unit",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "micro_batch_splits",
            "packing",
        ),
    ),
    ("Schedule", ("optim", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm")),
    (
        "Evaluation and checkpoints",
        (
            "eval_steps",
            "eval_rows",
            "exact_match_rows",
            "save_steps",
            "early_stopping_patience",
            "export_checkpoint",
        ),
    ),
    (
        "Machine",
        (
            "train_on_prompt",
            "skip_invalid_rows",
            "excluded_rows",
            "excluded_eval_rows",
            "precision",
            "gradient_checkpointing",
            "auto_reduce_memory",
            "seed",
            "threads",
        ),
    ),
)
# The settings with most effect on memory have a slider with these values.
SLIDER_VALUES = {
    "rank": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "num_virtual_tokens": (5, 10, 20, 50, 100, 200),
    "bottleneck_size": (8, 16, 32, 64, 128, 256, 512),
    "max_tokens_per_batch": tuple(2**power for power in range(8, 18)),
    "max_length": tuple(2**power for power in range(6, 16)),
}


@dataclass(frozen=True)
class Field:
    name: str
    title: str
    kind: str
    value: Any
    description: str
    recommended: str
    choices: tuple[str, ...]
    advanced: bool
    min_value: float | None
    max_value: float | None
    papers: dict[str, str]
    slider_values: tuple[int, ...] = ()

    @property
    def slider_index(self) -> int:
        """The slider position that is nearest to the field's value."""
        value = self.value[0] if isinstance(self.value, list) else self.value
        number = value if isinstance(value, int) else 0
        return min(
            range(len(self.slider_values)),
            key=lambda index: abs(self.slider_values[index] - number),
        )

    @property
    def text(self) -> str:
        """The value as the field's text; several values of a sweep are separated by commas."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return ", ".join(map(str, values))


def format_title(name: str) -> str:
    """A setting's label on the page."""
    return TITLES.get(name, name.replace("_", " ").capitalize()) if name else "the settings"


def get_method_name(values: Mapping[str, Any]) -> str:
    """The method of the values, or LoRA if it is missing or unknown."""
    name = values.get("method", "lora")
    return name if isinstance(name, str) and name in METHODS else "lora"


def build_fields(values: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of every setting that a user can change for the method, with the given values or
    the method's defaults.
    """
    name = get_method_name(values)
    method, config = METHODS[name], RunConfig.from_dict({"method": name})
    hidden = (
        INTERNAL_SETTINGS
        | config.get_inapplicable_settings()
        | set(method.incompatible_settings)
        | {"method"}
    )
    fields_by_name = {}
    for f in dataclasses.fields(RunConfig):
        if f.name in hidden:
            continue
        min_value, max_value = f.metadata["bounds"] or (None, None)
        fields_by_name[f.name] = Field(
            name=f.name,
            title=format_title(f.name),
            kind=str(f.type),
            value=values.get(f.name, getattr(config, f.name)),
            description=f.metadata["description"],
            recommended=method.learning_rate_range
            if f.name == "learning_rate"
            else f.metadata["recommended"],
            choices=f.metadata["choices"],
            advanced=f.metadata["advanced"],
            min_value=min_value,
            max_value=max_value,
            papers={
                paper: f"https://arxiv.org/abs/{number}"
                for paper, number in PAPERS.get(f.name, {}).items()
            },
            slider_values=SLIDER_VALUES.get(f.name, ()),
        )
    return fields_by_name


def list_unsupported_features(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Features that the method does not support, each with the reason."""
    method = METHODS[get_method_name(values)]
    features = [
        ("Merging into the base model", method.merge_unsupported_reason),
        ("Sharing a batch with other adapters", method.mixed_batch_unsupported_reason),
    ]
    features += [
        (format_title(name), reason) for name, reason in method.incompatible_settings.items()
    ]
    return [(feature, reason[0].upper() + reason[1:]) for feature, reason in features if reason]


def group_fields(values: Mapping[str, Any], *, advanced: bool) -> list[tuple[str, list[Field]]]:
    """Fields grouped under headings, the method's own settings first; either the basic or the
    advanced ones.
    """
    available, method = build_fields(values), METHODS[get_method_name(values)]
    headings = ((method.title, method.settings), *GROUPS)
    sections = [
        (
            title,
            [available[n] for n in names if n in available and available[n].advanced == advanced],
        )
        for title, names in headings
    ]
    return [(title, members) for title, members in sections if members]


def parse_form_settings(form_data: Mapping[str, str]) -> dict[str, Any]:
    """Convert form texts to typed settings. Numbers separated by commas become a list, which spans
    a sweep. Text that is not a number is kept, and RunConfig reports it with the setting's name.
    """
    settings: dict[str, Any] = {"method": form_data.get("method") or "lora"}
    for name, field in build_fields(settings).items():
        if field.kind == "bool":
            settings[name] = form_data.get(name) == "on"
        elif name in form_data:
            parts = (
                form_data[name].split(",") if field.kind in ("int", "float") else [form_data[name]]
            )
            values = [parse_value(part.strip(), field.kind) for part in parts if part.strip()] or [
                ""
            ]
            settings[name] = values if len(values) > 1 else values[0]
    return settings


def switch_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for another method. Changed values are kept; defaults of any method become the
    defaults of the new one.
    """
    method = METHODS[get_method_name(values)]
    defaults = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    known_defaults = {
        name: {defaults[name], *(m.defaults[name] for m in METHODS.values() if name in m.defaults)}
        for name in defaults
    }
    changed = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) or value not in known_defaults.get(name, ())
    }
    return {**method.defaults, **changed, "method": get_method_name(values)}


def parse_value(text: str, kind: str) -> Any:
    """The number in the text, or the text itself if it is not a number or `kind` is not numeric."""
    parsers = {"int": int, "float": float}
    try:
        return parsers[kind](text) if kind in parsers else text
    except ValueError:
        return text
