"""What a run is told: one dataclass, read by the engine and, for its form, by the site. No torch
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.engine.methods import METHODS
from training.engine.settings import (
    MethodSettings,
    candidate_ranks,
    check_method_settings,
    coerce_value,
    setting_field,
)
from training.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(MethodSettings):
    """Every setting of a run. Lengths are in tokens, intervals in optimizer steps."""

    method: str = setting_field("lora", "How the model is changed.", choices=tuple(METHODS))
    model_name: str = ""  # what the adapter says it was trained on; the folder's name if empty
    train_data: str = ""
    eval_data: str = ""
    # A folder of the same technique's weights, to begin with instead of its own start
    start_weights: str = ""
    learning_rate: float = setting_field(
        1e-3,
        "Size of a step: lower it when the loss jumps, raise it when it hardly falls.",
        recommended="1e-4 to 1e-3 for LoRA",
        bounds=(1e-8, 1),
    )
    lr_scheduler_type: str = setting_field(
        "cosine",
        "How the learning rate falls after the warm-up.",
        choices=("cosine", "linear", "constant_with_warmup"),
        advanced=True,
    )
    warmup_ratio: float = setting_field(
        0.05,
        "Share of the steps in which the learning rate rises from zero.",
        recommended="0.03 to 0.1",
        advanced=True,
        bounds=(0, 0.9),
    )
    weight_decay: float = setting_field(
        0.0, "Pulls weights towards zero.", recommended="0 to 0.1", advanced=True, bounds=(0, 1)
    )
    max_grad_norm: float = setting_field(
        1.0,
        "Gradients longer than this are shortened to it.",
        recommended="1.0",
        advanced=True,
        bounds=(1e-3, 1e6),
    )
    epochs: int = setting_field(
        1, "How often every row is seen.", recommended="1 to 5", bounds=(1, 1000)
    )
    max_steps: int = setting_field(
        0,
        "Stop after this many steps; 0 means: after the epochs.",
        recommended="0",
        bounds=(0, 10_000_000),
    )
    batch_unit: str = setting_field(
        "tokens",
        "What fills a batch: tokens keep memory even when rows differ in length; rows are what "
        "papers count.",
        choices=("tokens", "rows"),
        advanced=True,
    )
    max_tokens_per_batch: int = setting_field(
        1024,
        "Tokens that go through the model at once; lower it when memory is short.",
        recommended="512 to 16384",
        bounds=(16, 1_048_576),
    )
    per_device_train_batch_size: int = setting_field(
        8,
        "Rows that go through the model at once, if batches are counted in rows.",
        recommended="1 to 32",
        advanced=True,
        bounds=(1, 4096),
    )
    gradient_accumulation_steps: int = setting_field(
        1,
        "Batches added up before one optimizer step.",
        recommended="1 to 16",
        advanced=True,
        bounds=(1, 1024),
    )
    micro_batch_splits: int = setting_field(
        1,
        "Sends each batch through the model in so many parts, one after the other: the same step, "
        "less memory, a little slower.",
        recommended="1",
        advanced=True,
        bounds=(1, 4096),
    )
    max_length: int = setting_field(
        512,
        "Longer rows are cut off at this many tokens.",
        recommended="256 to 4096",
        bounds=(8, 131_072),
    )
    packing: bool = setting_field(
        False,
        "Puts several short rows into one sequence; they do not see each other. Worth it when "
        "lengths differ much.",
        recommended="off",
        advanced=True,
    )
    train_on_prompt: bool = setting_field(
        False,
        "Learn the prompt too, not only the assistant's answers.",
        recommended="off",
        advanced=True,
    )
    precision: str = setting_field(
        "auto",
        "bf16 halves memory where the hardware has it; mixed keeps weights in fp32 and computes "
        "in bf16; auto picks what suits.",
        choices=("auto", "bf16", "mixed", "fp32"),
        advanced=True,
    )
    optim: str = setting_field(
        "auto",
        "AdamW; in 8 bits its state takes a quarter, and paged it may move to the host when the "
        "GPU is full.",
        choices=("auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        advanced=True,
    )
    gradient_checkpointing: bool = setting_field(
        False,
        "Computes activations twice to save memory; about a third slower.",
        recommended="off",
        advanced=True,
    )
    auto_reduce_memory: bool = setting_field(
        False,
        "When memory runs out, halves what goes through the model at once and goes on from the "
        "last checkpoint by itself.",
        recommended="off",
        advanced=True,
    )
    seed: int = setting_field(
        0,
        "The same seed, data and machine give the same losses to the bit.",
        advanced=True,
        bounds=(0, 2**31 - 1),
    )
    eval_steps: int = setting_field(
        20,
        "Measure held-out loss and sample one answer every so many steps.",
        recommended="20 to 200",
        bounds=(1, 1_000_000),
    )
    eval_rows: int = setting_field(
        100,
        "How many held-out rows are measured each time.",
        recommended="50 to 500",
        advanced=True,
        bounds=(1, 100_000),
    )
    exact_match_rows: int = setting_field(
        20,
        "How many held-out prompts are answered at the end and compared word for word with the "
        "expected answers; 0: none.",
        recommended="20 to 200",
        advanced=True,
        bounds=(0, 100_000),
    )
    early_stopping_patience: int = setting_field(
        0,
        "Stop when the held-out loss has not improved in this many measurements; 0 trains to the "
        "end.",
        recommended="0, or 3 to 5",
        advanced=True,
        bounds=(0, 10_000),
    )
    save_steps: int = setting_field(
        20, "Save a checkpoint every so many steps.", recommended="20 to 500", bounds=(1, 1_000_000)
    )
    export_checkpoint: str = setting_field(
        "best",
        "The adapter is the checkpoint with the best held-out loss, or the last.",
        choices=("best", "last"),
        advanced=True,
    )
    threads: int = setting_field(
        0, "CPU threads; 0 means all cores.", recommended="0", advanced=True, bounds=(0, 1024)
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, bounds, choices = (
                getattr(self, f.name),
                f.metadata.get("bounds"),
                f.metadata.get("choices"),
            )
            if bounds and not bounds[0] <= value <= bounds[1]:  # NaN is in no range
                message = (
                    f"{f.name} is {str(value)[:20]}; it must be from {bounds[0]:g} to "
                    f"{bounds[1]:g}."
                )
                raise ConfigError(message, field=f.name)
            if choices and value not in choices:
                raise ConfigError(
                    f"{f.name} is {value!r}; it must be one of {', '.join(choices)}.", field=f.name
                )
        self.check_inapplicable_settings()
        check_method_settings(self)
        if self.batch_unit == "tokens" and self.max_tokens_per_batch < self.max_length:
            raise ConfigError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but one row may be max_length = "
                f"{self.max_length} tokens; raise the first or lower the second.",
                field="max_tokens_per_batch",
            )
        earliest_stop = self.early_stopping_patience * self.eval_steps
        if self.max_steps and earliest_stop >= self.max_steps:
            raise ConfigError(
                f"early_stopping_patience is {self.early_stopping_patience} with eval_steps = "
                f"{self.eval_steps}, so it could stop at step {earliest_stop} at the earliest, but "
                f"max_steps is {self.max_steps}; lower the first two or raise the last.",
                field="early_stopping_patience",
            )

    @classmethod
    def check_types(cls, values: Mapping[str, Any]) -> None:
        """Raises ConfigError: a setting that there is not, or one of the wrong type."""
        type_names = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in type_names:
                raise ConfigError(f"There is no setting {name[:40]!r}.", field=name[:40])
            coerce_value(name, type_names[name], value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check names and types of a JSON object; what it leaves out is as usual for its technique.

        Raises:
            ConfigError: names the field that is unknown or of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"There is no setting {', '.join(unknown)}; known are {', '.join(known)}.",
                field=unknown[0],
            )
        typed = {
            name: coerce_value(name, str(known[name].type), value) for name, value in values.items()
        }
        method = METHODS.get(typed.get("method", "lora"))
        return cls(**{**(method.defaults if method else {}), **typed})

    def to_dict(self) -> dict[str, Any]:
        """The settings that this run has; those of other techniques are left out."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in self.inapplicable_settings()
        }

    def resolve_optimizer(self, device: str) -> str:
        """`auto` is paged 8-bit AdamW for QLoRA on CUDA, as its paper has it, and AdamW
        elsewhere.
        """
        if self.optim != "auto":
            return self.optim
        return (
            "paged_adamw_8bit"
            if METHODS[self.method].has_quantized_base and device == "cuda"
            else "adamw_torch"
        )

    @property
    def accumulates_gradients(self) -> bool:
        """Do gradients of several passes add up before a step?"""
        return self.gradient_accumulation_steps > 1 or self.micro_batch_splits > 1

    @property
    def has_tuning(self) -> bool:
        """Are there trials before the run?"""
        return self.tuning_budget_fraction > 0 or self.tuning_budget_minutes > 0

    @property
    def prepended_tokens(self) -> int:
        """Virtual tokens that take up positions before every row."""
        return (
            self.num_virtual_tokens if "num_virtual_tokens" in METHODS[self.method].settings else 0
        )

    def memory_upper_bound(self) -> RunConfig:
        """The settings with the most memory that this run may come to: trials may double the
        rank.
        """
        if not self.has_tuning or "rank" not in self.tuning_search_space:
            return self
        return dataclasses.replace(self, rank=max(candidate_ranks(self.rank)))

    def inapplicable_settings(self) -> set[str]:
        """Settings that belong to other techniques."""
        method_settings = {name for method in METHODS.values() for name in method.settings}
        return method_settings - set(METHODS[self.method].settings)

    def check_inapplicable_settings(self) -> None:
        """Raises ConfigError: a setting was turned that the technique does not have, or cannot go
        with.
        """
        method = METHODS[self.method]
        for f in dataclasses.fields(self):
            if f.name in self.inapplicable_settings() and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"{f.name} is not a setting of {method.title}; leave it out.", field=f.name
                )
        for name, reason in method.incompatible_settings.items():
            if getattr(self, name):
                raise ConfigError(
                    f"{method.title} cannot be used with {name}: {reason}", field=name
                )

    def list_warnings(self) -> list[str]:
        """What is allowed but seldom meant, each with the nearest usual value."""
        messages = []
        method = METHODS[self.method]
        if self.learning_rate > method.max_learning_rate:
            messages.append(
                f"learning_rate is {self.learning_rate:g}; above {method.max_learning_rate:g} the loss "
                f"of {method.title} usually jumps. {method.defaults.get('learning_rate', 1e-3):g} is "
                "a safe start."
            )
        if self.precision == "bf16" and method.is_full_finetuning:
            messages.append(
                "precision is bf16: small steps round away in bf16 weights. mixed keeps them, at "
                "twice the memory."
            )
        if "alpha" in method.settings and self.alpha > 4 * self.rank:
            messages.append(
                f"alpha is {self.alpha} with rank {self.rank}: updates count "
                f"{self.alpha / self.rank:g}-fold; usual is 2."
            )
        if self.max_steps and self.eval_steps > self.max_steps:
            messages.append(
                f"eval_steps is {self.eval_steps}, but there are only {self.max_steps} "
                "steps: the held-out loss is measured at the start and the end only."
            )
        if self.epochs > 10 and not self.max_steps and not self.early_stopping_patience:
            messages.append(
                f"epochs is {self.epochs} without early_stopping_patience: the rows will be learned by "
                "heart. 1 to 5 is usual."
            )
        if self.train_on_prompt:
            messages.append("train_on_prompt is on: the model also learns to write the questions.")
        return messages

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step 1..total_steps: linear warm-up to the full rate (else step 1 has
        it), then the schedule.
        """
        warmup = max(1, math.ceil(self.warmup_ratio * total_steps))
        if step <= warmup:
            return self.learning_rate * step / warmup
        progress = (step - warmup) / max(1, total_steps - warmup + 1)
        factor = {
            "constant_with_warmup": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }
        return self.learning_rate * factor[self.lr_scheduler_type]
