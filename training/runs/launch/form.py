"""The launch form, made of the engine's own config class: its fields, sentences, ranges and
errors.
"""

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
    "train_on_prompt": "Train on the prompt",
    "max_tokens_per_batch": "Tokens per batch",
    "eval_steps": "Evaluate every",
    "eval_rows": "Held-out rows",
    "exact_match_rows": "Answers compared",
    "micro_batch_splits": "Parts of a batch",
    "auto_reduce_memory": "Recover by itself",
    "save_steps": "Save every",
    "max_steps": "Most steps",
    "warmup_ratio": "Warm-up share",
    "max_length": "Longest row",
    "threads": "CPU threads",
    "batch_unit": "Batches are counted in",
    "per_device_train_batch_size": "Rows per batch",
    "early_stopping_patience": "Early stopping",
    "init_lora_weights": "Start",
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "loraplus_lr_ratio": "LoRA+ ratio",
    "rank_pattern": "Ranks by layer",
    "alpha_pattern": "Alphas by layer",
    "prompt_tuning_init": "Start from",
    "prompt_tuning_init_text": "Text to start from",
    "bottleneck_size": "Bottleneck size",
    "prefix_projection": "Projection",
    "tuning_budget_fraction": "Trials first",
    "tuning_budget_minutes": "Minutes of trials",
    "tuning_search_space": "Trials vary",
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
        "Measuring and saving",
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
            "precision",
            "gradient_checkpointing",
            "auto_reduce_memory",
            "seed",
            "threads",
        ),
    ),
)
# What moves memory most has a slider beside its field, with these values.
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
        """Where the slider stands: at the value nearest to the field's."""
        value = self.value[0] if isinstance(self.value, list) else self.value
        number = value if isinstance(value, int) else 0
        return min(
            range(len(self.slider_values)),
            key=lambda index: abs(self.slider_values[index] - number),
        )

    @property
    def text(self) -> str:
        """The value as one types it; several values of a sweep with commas."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return ", ".join(map(str, values))


def format_title(name: str) -> str:
    """A setting's name as the page writes it."""
    return TITLES.get(name, name.replace("_", " ").capitalize()) if name else "the settings"


def get_method_name(values: Mapping[str, Any]) -> str:
    """The technique that the values name, LoRA if they name none that there is."""
    name = values.get("method", "lora")
    return name if isinstance(name, str) and name in METHODS else "lora"


def build_fields(values: Mapping[str, Any]) -> dict[str, Field]:
    """Every setting that a person may turn for the technique, with the given value or what is usual
    for it.
    """
    name = get_method_name(values)
    method, config = METHODS[name], RunConfig.from_dict({"method": name})
    hidden = (
        INTERNAL_SETTINGS
        | config.inapplicable_settings()
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
    """What the technique cannot do, each with its reason."""
    method = METHODS[get_method_name(values)]
    features = [
        ("Merging into the base", method.merge_unsupported_reason),
        ("Sharing a batch with other adapters", method.mixed_batch_unsupported_reason),
    ]
    features += [(format_title(name), why) for name, why in method.incompatible_settings.items()]
    return [(feature, why[0].upper() + why[1:]) for feature, why in features if why]


def group_fields(values: Mapping[str, Any], *, advanced: bool) -> list[tuple[str, list[Field]]]:
    """Fields under their headings, the technique's own first; either those in view or those behind
    the fold.
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
    """Form text -> typed settings; numbers with commas become a list, which makes a sweep.

    What cannot be read as a number stays text, and the config class refuses it by name.
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
    """The values for another technique: what a person turned stays, what was usual for some
    technique is now usual for this.
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
    parsers = {"int": int, "float": float}
    try:
        return parsers[kind](text) if kind in parsers else text
    except ValueError:
        return text
