"""The settings of a run: one dataclass for the engine and for the site's launch form. Does not
import torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.engine.methods import METHODS
from training.engine.row_numbers import MAX_CHARACTERS, parse_row_numbers
from training.engine.settings import (
    MethodSettings,
    check_method_settings,
    coerce_value,
    list_candidate_ranks,
    setting_field,
)
from training.errors import ConfigError

EXCLUDED_ROW_SETTINGS = ("excluded_rows", "excluded_eval_rows")  # of both splits
# Settings that say which rows of the data are used
ROW_SETTINGS = ("skip_invalid_rows", *EXCLUDED_ROW_SETTINGS)


def check_row_numbers(text: str, name: str) -> None:
    """Raises ConfigError: the setting is not a list of row numbers, or is too long."""
    try:
        parse_row_numbers(text)
    except ValueError as error:
        raise ConfigError(
            f"{name} must look like `3, 17-20`, ascending: {error}.", field=name
        ) from error
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{name} has more than {MAX_CHARACTERS:,} characters.", field=name)


@dataclass(frozen=True, kw_only=True)
class RunConfig(MethodSettings):
    """Every setting of a run. Lengths are in tokens, intervals in optimizer steps."""

    method: str = setting_field("lora", "Fine-tuning method.", choices=tuple(METHODS))
    # base_model_name_or_path in the adapter's config; the folder's name if empty
    model_name: str = ""
    train_data: str = ""
    eval_data: str = ""
    # A folder with weights of the same method that training starts from
    init_from: str = ""
    learning_rate: float = setting_field(
        1e-3,
        "Size of the weight updates. Lower it if the loss jumps; raise it if it barely falls.",
        recommended="1e-4 to 1e-3 for LoRA",
        bounds=(1e-8, 1),
    )
    lr_scheduler_type: str = setting_field(
        "cosine",
        "How the learning rate changes after the warmup.",
        choices=("cosine", "linear", "constant_with_warmup"),
        advanced=True,
    )
    warmup_ratio: float = setting_field(
        0.05,
        "Fraction of the steps during which the learning rate rises from zero.",
        recommended="0.03 to 0.1",
        advanced=True,
        bounds=(0, 0.9),
    )
    weight_decay: float = setting_field(
        0.0,
        "AdamW's weight decay, which pulls weights toward zero.",
        recommended="0 to 0.1",
        advanced=True,
        bounds=(0, 1),
    )
    max_grad_norm: float = setting_field(
        1.0,
        "Gradients are clipped to this norm.",
        recommended="1.0",
        advanced=True,
        bounds=(1e-3, 1e6),
    )
    epochs: int = setting_field(
        1, "Number of passes over the training data.", recommended="1 to 5", bounds=(1, 1000)
    )
    max_steps: int = setting_field(
        0,
        "Stop after this many steps. 0 trains for all epochs.",
        recommended="0",
        bounds=(0, 10_000_000),
    )
    batch_unit: str = setting_field(
        "tokens",
        "Unit of the batch size. Tokens keep memory use steady when rows differ in length; rows "
        "are what papers report.",
        choices=("tokens", "rows"),
        advanced=True,
    )
    max_tokens_per_batch: int = setting_field(
        1024,
        "Max tokens in a batch, padding included. Lower it if memory is short.",
        recommended="512 to 16384",
        bounds=(16, 1_048_576),
    )
    per_device_train_batch_size: int = setting_field(
        8,
        "Rows in a batch, if batch_unit is rows.",
        recommended="1 to 32",
        advanced=True,
        bounds=(1, 4096),
    )
    gradient_accumulation_steps: int = setting_field(
        1,
        "Number of batches whose gradients are added up for one optimizer step.",
        recommended="1 to 16",
        advanced=True,
        bounds=(1, 1024),
    )
    micro_batch_splits: int = setting_field(
        1,
        "Splits each batch into this many micro-batches that are processed one after another. The "
        "optimizer step stays the same; it uses less memory and is a little slower.",
        recommended="1",
        advanced=True,
        bounds=(1, 4096),
    )
    max_length: int = setting_field(
        512,
        "Max tokens per row. Longer rows are truncated.",
        recommended="256 to 4096",
        bounds=(8, 131_072),
    )
    packing: bool = setting_field(
        False,
        "Packs several short rows into one sequence without attention between them. Useful if row "
        "lengths vary a lot.",
        recommended="off",
        advanced=True,
    )
    train_on_prompt: bool = setting_field(
        False,
        "Compute the loss on the prompt, too, instead of only on the assistant's answers.",
        recommended="off",
        advanced=True,
    )
    skip_invalid_rows: bool = setting_field(
        False,
        "Leave out the rows that the model's chat template rejects. Otherwise one such row refuses "
        "the run.",
        recommended="off",
        advanced=True,
    )
    excluded_rows: str = setting_field(
        "",
        "Numbers of training rows that are left out, such as 3, 17-20. A run with "
        "skip_invalid_rows adds those that it left out.",
        recommended="empty",
        advanced=True,
    )
    excluded_eval_rows: str = setting_field(
        "",
        "Numbers of held-out rows that are left out, in the same form.",
        recommended="empty",
        advanced=True,
    )
    precision: str = setting_field(
        "auto",
        "bf16 halves memory if the hardware supports it. mixed keeps weights in fp32 and computes "
        "in bf16. auto picks the best one for the hardware and method.",
        choices=("auto", "bf16", "mixed", "fp32"),
        advanced=True,
    )
    optim: str = setting_field(
        "auto",
        "AdamW variant. The 8-bit ones need a quarter of the memory for optimizer states; the "
        "paged one moves states to host memory when the GPU is full.",
        choices=("auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        advanced=True,
    )
    gradient_checkpointing: bool = setting_field(
        False,
        "Recomputes activations in the backward pass to save memory. About a third slower.",
        recommended="off",
        advanced=True,
    )
    auto_reduce_memory: bool = setting_field(
        False,
        "When memory runs out, doubles micro_batch_splits and resumes from the last checkpoint "
        "automatically.",
        recommended="off",
        advanced=True,
    )
    seed: int = setting_field(
        0,
        "Random seed. The same seed, data and machine give bit-identical losses.",
        advanced=True,
        bounds=(0, 2**31 - 1),
    )
    eval_steps: int = setting_field(
        20,
        "Number of steps between evaluations, which compute held-out loss and generate one answer.",
        recommended="20 to 200",
        bounds=(1, 1_000_000),
    )
    eval_rows: int = setting_field(
        100,
        "Number of held-out rows in each evaluation.",
        recommended="50 to 500",
        advanced=True,
        bounds=(1, 100_000),
    )
    exact_match_rows: int = setting_field(
        20,
        "Number of held-out prompts that are answered after training to compute exact match. 0 "
        "skips it.",
        recommended="20 to 200",
        advanced=True,
        bounds=(0, 100_000),
    )
    early_stopping_patience: int = setting_field(
        0,
        "Stop if the held-out loss does not improve in this many evaluations. 0 disables early "
        "stopping.",
        recommended="0, or 3 to 5",
        advanced=True,
        bounds=(0, 10_000),
    )
    save_steps: int = setting_field(
        20, "Number of steps between checkpoints.", recommended="20 to 500", bounds=(1, 1_000_000)
    )
    export_checkpoint: str = setting_field(
        "best",
        "Export the checkpoint with the best held-out loss, or the last one.",
        choices=("best", "last"),
        advanced=True,
    )
    threads: int = setting_field(
        0, "CPU threads. 0 uses all cores.", recommended="0", advanced=True, bounds=(0, 1024)
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
                    f"{f.name} is {str(value)[:20]}, but must be between {bounds[0]:g} and "
                    f"{bounds[1]:g}."
                )
                raise ConfigError(message, field=f.name)
            if choices and value not in choices:
                raise ConfigError(
                    f"{f.name} is {value!r}, but must be one of {', '.join(choices)}.",
                    field=f.name,
                )
        for name in EXCLUDED_ROW_SETTINGS:
            check_row_numbers(getattr(self, name), name)
        self.check_inapplicable_settings()
        check_method_settings(self)
        if self.batch_unit == "tokens" and self.max_tokens_per_batch < self.max_length:
            raise ConfigError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but a single row can have "
                f"max_length = {self.max_length} tokens. Raise max_tokens_per_batch or lower "
                "max_length.",
                field="max_tokens_per_batch",
            )
        earliest_stop = self.early_stopping_patience * self.eval_steps
        if self.max_steps and earliest_stop >= self.max_steps:
            raise ConfigError(
                f"early_stopping_patience is {self.early_stopping_patience} with eval_steps = "
                f"{self.eval_steps}, so training could stop at step {earliest_stop} at the "
                f"earliest, but max_steps is {self.max_steps}. Lower one of the first two or raise "
                "max_steps.",
                field="early_stopping_patience",
            )

    @classmethod
    def check_types(cls, values: Mapping[str, Any]) -> None:
        """Raises ConfigError: a setting is unknown or its value has the wrong type."""
        type_names = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in type_names:
                raise ConfigError(f"Unknown setting {name[:40]!r}.", field=name[:40])
            coerce_value(name, type_names[name], value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build a config from a JSON object. Missing settings have the defaults of the method.

        Raises:
            ConfigError: a setting is unknown, has the wrong type or is invalid.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"Unknown setting {', '.join(unknown)}. Known settings: {', '.join(known)}.",
                field=unknown[0],
            )
        typed = {
            name: coerce_value(name, str(known[name].type), value) for name, value in values.items()
        }
        method = METHODS.get(typed.get("method", "lora"))
        return cls(**{**(method.defaults if method else {}), **typed})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of this run as JSON, without those of other methods."""
        inapplicable = self.get_inapplicable_settings()
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in inapplicable
        }

    def resolve_optimizer(self, device: str) -> str:
        """Return the optimizer for a device: `auto` is paged 8-bit AdamW for QLoRA on CUDA, as in
        its paper, and AdamW otherwise.
        """
        if self.optim != "auto":
            return self.optim
        is_paged = METHODS[self.method].has_quantized_base and device == "cuda"
        return "paged_adamw_8bit" if is_paged else "adamw_torch"

    @property
    def accumulates_gradients(self) -> bool:
        """True if one optimizer step adds up the gradients of several passes."""
        return self.gradient_accumulation_steps > 1 or self.micro_batch_splits > 1

    @property
    def has_tuning(self) -> bool:
        """True if tuning trials run before the training."""
        return self.tuning_budget_fraction > 0 or self.tuning_budget_minutes > 0

    @property
    def prepended_tokens(self) -> int:
        """Virtual tokens that use positions in front of every row."""
        return (
            self.num_virtual_tokens if "num_virtual_tokens" in METHODS[self.method].settings else 0
        )

    def to_memory_upper_bound(self) -> RunConfig:
        """Return the settings with the largest memory use that this run can reach: tuning may
        double the rank.
        """
        if not self.has_tuning or "rank" not in self.tuning_search_space:
            return self
        return dataclasses.replace(self, rank=max(list_candidate_ranks(self.rank)))

    def get_inapplicable_settings(self) -> set[str]:
        """Return the names of the settings that belong only to other methods."""
        method_settings = {name for method in METHODS.values() for name in method.settings}
        return method_settings - set(METHODS[self.method].settings)

    def check_inapplicable_settings(self) -> None:
        """Raises ConfigError: a setting was changed that the method does not have or that is
        incompatible with it.
        """
        method, inapplicable = METHODS[self.method], self.get_inapplicable_settings()
        for f in dataclasses.fields(self):
            if f.name in inapplicable and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"{f.name} is not a setting of {method.title}. Remove it.", field=f.name
                )
        for name, reason in method.incompatible_settings.items():
            if getattr(self, name):
                raise ConfigError(
                    f"{method.title} is incompatible with {name}: {reason}", field=name
                )

    def list_warnings(self) -> list[str]:
        """Return warnings about valid but unlikely settings, each with a typical value."""
        messages = []
        method = METHODS[self.method]
        if self.learning_rate > method.max_learning_rate:
            messages.append(
                f"learning_rate is {self.learning_rate:g}. Above {method.max_learning_rate:g}, the "
                f"loss of {method.title} usually becomes unstable; "
                f"{method.defaults.get('learning_rate', 1e-3):g} is a safe value."
            )
        if self.precision == "bf16" and method.is_full_finetuning:
            messages.append(
                "precision is bf16, so small updates are lost to rounding in bf16 weights. mixed "
                "keeps them, but needs twice the memory."
            )
        if "alpha" in method.settings and self.alpha > 4 * self.rank:
            messages.append(
                f"alpha is {self.alpha} with rank {self.rank}, so updates are scaled by "
                f"{self.alpha / self.rank:g}. A scale of 2 is typical."
            )
        if self.max_steps and self.eval_steps > self.max_steps:
            messages.append(
                f"eval_steps is {self.eval_steps}, but the run has only {self.max_steps} steps, so "
                "the held-out loss is computed only at the start and the end."
            )
        if self.epochs > 10 and not self.max_steps and not self.early_stopping_patience:
            messages.append(
                f"epochs is {self.epochs} with no early_stopping_patience, so the model will "
                "likely overfit. 1 to 5 is typical."
            )
        if self.train_on_prompt:
            messages.append("train_on_prompt is on, so the model also learns the prompts.")
        return messages

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step in 1..total_steps: a linear warmup to the full rate
        (without warmup, step 1 has it), then the schedule.
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
