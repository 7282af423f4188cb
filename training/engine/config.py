"""What a run is told: one dataclass, read by the engine and, for its form, by the site. No torch
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.engine.methods import TABLE
from training.engine.settings import TechniqueSettings, check_technique, ranks, setting, typed_value
from training.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(TechniqueSettings):
    """Every setting of a run. Lengths are in tokens, intervals in optimizer steps."""

    method: str = setting("lora", "How the model is changed.", choices=tuple(TABLE))
    model_name: str = ""  # what the adapter says it was trained on; the folder's name if empty
    train_data: str = ""
    eval_data: str = ""
    # A folder of the same technique's weights, to begin with instead of its own start
    start_weights: str = ""
    learning_rate: float = setting(
        1e-3,
        "Size of a step: lower it when the loss jumps, raise it when it hardly falls.",
        usual="1e-4 to 1e-3 for LoRA",
        within=(1e-8, 1),
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "How the learning rate falls after the warm-up.",
        choices=("cosine", "linear", "constant_with_warmup"),
        advanced=True,
    )
    warmup_ratio: float = setting(
        0.05,
        "Share of the steps in which the learning rate rises from zero.",
        usual="0.03 to 0.1",
        advanced=True,
        within=(0, 0.9),
    )
    weight_decay: float = setting(
        0.0, "Pulls weights towards zero.", usual="0 to 0.1", advanced=True, within=(0, 1)
    )
    max_grad_norm: float = setting(
        1.0,
        "Gradients longer than this are shortened to it.",
        usual="1.0",
        advanced=True,
        within=(1e-3, 1e6),
    )
    epochs: int = setting(1, "How often every row is seen.", usual="1 to 5", within=(1, 1000))
    max_steps: int = setting(
        0,
        "Stop after this many steps; 0 means: after the epochs.",
        usual="0",
        within=(0, 10_000_000),
    )
    batch_unit: str = setting(
        "tokens",
        "What fills a batch: tokens keep memory even when rows differ in length; rows are what "
        "papers count.",
        choices=("tokens", "rows"),
        advanced=True,
    )
    max_tokens_per_batch: int = setting(
        1024,
        "Tokens that go through the model at once; lower it when memory is short.",
        usual="512 to 16384",
        within=(16, 1_048_576),
    )
    per_device_train_batch_size: int = setting(
        8,
        "Rows that go through the model at once, if batches are counted in rows.",
        usual="1 to 32",
        advanced=True,
        within=(1, 4096),
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Batches added up before one optimizer step.",
        usual="1 to 16",
        advanced=True,
        within=(1, 1024),
    )
    micro_batch_splits: int = setting(
        1,
        "Sends each batch through the model in so many parts, one after the other: the same step, "
        "less memory, a little slower.",
        usual="1",
        advanced=True,
        within=(1, 4096),
    )
    max_length: int = setting(
        512,
        "Longer rows are cut off at this many tokens.",
        usual="256 to 4096",
        within=(8, 131_072),
    )
    packing: bool = setting(
        False,
        "Puts several short rows into one sequence; they do not see each other. Worth it when "
        "lengths differ much.",
        usual="off",
        advanced=True,
    )
    train_on_prompt: bool = setting(
        False, "Learn the prompt too, not only the assistant's answers.", usual="off", advanced=True
    )
    precision: str = setting(
        "auto",
        "bf16 halves memory where the hardware has it; mixed keeps weights in fp32 and computes "
        "in bf16; auto picks what suits.",
        choices=("auto", "bf16", "mixed", "fp32"),
        advanced=True,
    )
    optim: str = setting(
        "auto",
        "AdamW; in 8 bits its state takes a quarter, and paged it may move to the host when the "
        "GPU is full.",
        choices=("auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        advanced=True,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Computes activations twice to save memory; about a third slower.",
        usual="off",
        advanced=True,
    )
    auto_reduce_memory: bool = setting(
        False,
        "When memory runs out, halves what goes through the model at once and goes on from the "
        "last checkpoint by itself.",
        usual="off",
        advanced=True,
    )
    seed: int = setting(
        0,
        "The same seed, data and machine give the same losses to the bit.",
        advanced=True,
        within=(0, 2**31 - 1),
    )
    eval_steps: int = setting(
        20,
        "Measure held-out loss and sample one answer every so many steps.",
        usual="20 to 200",
        within=(1, 1_000_000),
    )
    eval_rows: int = setting(
        100,
        "How many held-out rows are measured each time.",
        usual="50 to 500",
        advanced=True,
        within=(1, 100_000),
    )
    exact_match_rows: int = setting(
        20,
        "How many held-out prompts are answered at the end and compared word for word with the "
        "expected answers; 0: none.",
        usual="20 to 200",
        advanced=True,
        within=(0, 100_000),
    )
    early_stopping_patience: int = setting(
        0,
        "Stop when the held-out loss has not improved in this many measurements; 0 trains to the "
        "end.",
        usual="0, or 3 to 5",
        advanced=True,
        within=(0, 10_000),
    )
    save_steps: int = setting(
        20, "Save a checkpoint every so many steps.", usual="20 to 500", within=(1, 1_000_000)
    )
    export_checkpoint: str = setting(
        "best",
        "The adapter is the checkpoint with the best held-out loss, or the last.",
        choices=("best", "last"),
        advanced=True,
    )
    threads: int = setting(
        0, "CPU threads; 0 means all cores.", usual="0", advanced=True, within=(0, 1024)
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, within, choices = (
                getattr(self, f.name),
                f.metadata.get("within"),
                f.metadata.get("choices"),
            )
            if within and not within[0] <= value <= within[1]:  # NaN is in no range
                words = (
                    f"{f.name} is {str(value)[:20]}; it must be from {within[0]:g} to "
                    f"{within[1]:g}."
                )
                raise ConfigError(words, field=f.name)
            if choices and value not in choices:
                raise ConfigError(
                    f"{f.name} is {value!r}; it must be one of {', '.join(choices)}.", field=f.name
                )
        self.refuse_foreign()
        check_technique(self)
        if self.batch_unit == "tokens" and self.max_tokens_per_batch < self.max_length:
            raise ConfigError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but one row may be max_length = "
                f"{self.max_length} tokens; raise the first or lower the second.",
                field="max_tokens_per_batch",
            )
        needed = self.early_stopping_patience * self.eval_steps
        if self.max_steps and needed >= self.max_steps:
            raise ConfigError(
                f"early_stopping_patience is {self.early_stopping_patience} with eval_steps = "
                f"{self.eval_steps}, so it could stop at step {needed} at the earliest, but "
                f"max_steps is {self.max_steps}; lower the first two or raise the last.",
                field="early_stopping_patience",
            )

    @classmethod
    def check_types(cls, values: Mapping[str, Any]) -> None:
        """Raises ConfigError: a setting that there is not, or one of the wrong type."""
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in kinds:
                raise ConfigError(f"There is no setting {name[:40]!r}.", field=name[:40])
            typed_value(name, kinds[name], value)

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
            name: typed_value(name, str(known[name].type), value) for name, value in values.items()
        }
        method = TABLE.get(typed.get("method", "lora"))
        return cls(**{**(method.usual if method else {}), **typed})

    def to_dict(self) -> dict[str, Any]:
        """The settings that this run has; those of other techniques are left out."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in self.foreign()
        }

    def optimizer_on(self, device: str) -> str:
        """`auto` is paged 8-bit AdamW for QLoRA on CUDA, as its paper has it, and AdamW
        elsewhere.
        """
        if self.optim != "auto":
            return self.optim
        return "paged_adamw_8bit" if TABLE[self.method].quantised and device == "cuda" else "adamw_torch"

    @property
    def accumulates(self) -> bool:
        """Do gradients of several passes add up before a step?"""
        return self.gradient_accumulation_steps > 1 or self.micro_batch_splits > 1

    @property
    def tunes(self) -> bool:
        """Are there trials before the run?"""
        return self.tuning_budget_fraction > 0 or self.tuning_budget_minutes > 0

    @property
    def tokens_in_front(self) -> int:
        """Virtual tokens that take up positions before every row."""
        return self.num_virtual_tokens if "num_virtual_tokens" in TABLE[self.method].settings else 0

    def widest(self) -> RunConfig:
        """The settings with the most memory that this run may come to: trials may double the
        rank.
        """
        if not self.tunes or "rank" not in self.tuning_search_space:
            return self
        return dataclasses.replace(self, rank=max(ranks(self.rank)))

    def foreign(self) -> set[str]:
        """Settings that belong to other techniques."""
        theirs = {name for method in TABLE.values() for name in method.settings}
        return theirs - set(TABLE[self.method].settings)

    def refuse_foreign(self) -> None:
        """Raises ConfigError: a setting was turned that the technique does not have, or cannot go
        with.
        """
        method = TABLE[self.method]
        for f in dataclasses.fields(self):
            if f.name in self.foreign() and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"{f.name} is not a setting of {method.title}; leave it out.", field=f.name
                )
        for name, why in method.never.items():
            if getattr(self, name):
                raise ConfigError(f"{method.title} cannot be used with {name}: {why}", field=name)

    def warnings(self) -> list[str]:
        """What is allowed but seldom meant, each with the nearest usual value."""
        found = []
        method = TABLE[self.method]
        if self.learning_rate > method.highest_rate:
            found.append(
                f"learning_rate is {self.learning_rate:g}; above {method.highest_rate:g} the loss "
                f"of {method.title} usually jumps. {method.usual.get('learning_rate', 1e-3):g} is "
                "a safe start."
            )
        if self.precision == "bf16" and method.whole_model:
            found.append(
                "precision is bf16: small steps round away in bf16 weights. mixed keeps them, at "
                "twice the memory."
            )
        if "alpha" in method.settings and self.alpha > 4 * self.rank:
            found.append(
                f"alpha is {self.alpha} with rank {self.rank}: updates count "
                f"{self.alpha / self.rank:g}-fold; usual is 2."
            )
        if self.max_steps and self.eval_steps > self.max_steps:
            found.append(
                f"eval_steps is {self.eval_steps}, but there are only {self.max_steps} "
                "steps: the held-out loss is measured at the start and the end only."
            )
        if self.epochs > 10 and not self.max_steps and not self.early_stopping_patience:
            found.append(
                f"epochs is {self.epochs} without early_stopping_patience: the rows will be learned by "
                "heart. 1 to 5 is usual."
            )
        if self.train_on_prompt:
            found.append("train_on_prompt is on: the model also learns to write the questions.")
        return found

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step 1..total_steps: linear warm-up to the full rate (else step 1 has
        it), then the schedule.
        """
        warmup = max(1, math.ceil(self.warmup_ratio * total_steps))
        if step <= warmup:
            return self.learning_rate * step / warmup
        done = (step - warmup) / max(1, total_steps - warmup + 1)
        factor = {
            "constant_with_warmup": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return self.learning_rate * factor[self.lr_scheduler_type]
