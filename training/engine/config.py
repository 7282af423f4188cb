"""What a run is told: one dataclass, read by the engine and, for its form, by the site. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.errors import UserError

TARGETS = re.compile(r"[\w.,\- ]{1,500}", re.ASCII)
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "bf16", "fp32")
BATCHINGS = ("tokens", "rows")
FINAL_WEIGHTS = ("best", "last")
METHODS = ("lora",)  # the names of training/engine/methods; tests/engine/test_methods.py holds the two together


class ConfigError(UserError):
    """A setting that cannot be right, or two that contradict each other."""


def setting(default: Any, words: str, *, usual: str = "", choices: tuple[str, ...] = (), advanced: bool = False) -> Any:
    """A field with the sentence that the launch page prints under it, and the range that most people stay in."""
    return field(
        default=default,
        metadata={"words": words, "usual": usual, "choices": choices, "advanced": advanced},
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of a run. Lengths are in tokens, intervals in optimizer steps."""

    model: str = ""
    model_name: str = ""  # what the adapter says it was trained on; the folder's name if empty
    train_data: str = ""
    heldout_data: str = ""
    method: str = setting("lora", "How the model is changed.", choices=METHODS)
    rank: int = setting(16, "Size of the update: more learns more and takes more memory.", usual="8 to 64")
    alpha: int = setting(32, "Strength of the update; the update is scaled by alpha / rank.", usual="rank to 2 x rank")
    dropout: float = setting(
        0.0,
        "Share of the update's inputs left out at random; raise it when data is little. Costs a third more time on a CPU.",
        usual="0 to 0.1",
    )
    target_modules: str = setting(
        "all-linear",
        "Which layers are adapted: all-linear, or names with commas such as q_proj,v_proj.",
        usual="all-linear",
        advanced=True,
    )
    learning_rate: float = setting(
        1e-3,
        "Size of a step: lower it when the loss jumps, raise it when it hardly falls.",
        usual="1e-4 to 1e-3",
    )
    schedule: str = setting("cosine", "How the learning rate falls after the warm-up.", choices=SCHEDULES, advanced=True)
    warmup_ratio: float = setting(
        0.05,
        "Share of the steps in which the learning rate rises from zero.",
        usual="0.03 to 0.1",
        advanced=True,
    )
    weight_decay: float = setting(0.0, "Pulls weights towards zero.", usual="0 to 0.1", advanced=True)
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it.", usual="1.0", advanced=True)
    epochs: int = setting(1, "How often every row is seen.", usual="1 to 5")
    max_steps: int = setting(0, "Stop after this many steps; 0 means: after the epochs.", usual="0")
    batch_by: str = setting(
        "tokens",
        "What fills a batch: tokens keep memory even when rows differ in length; rows are what papers count.",
        choices=BATCHINGS,
        advanced=True,
    )
    tokens_per_batch: int = setting(
        1024, "Tokens that go through the model at once; lower it when memory is short.", usual="512 to 16384"
    )
    rows_per_batch: int = setting(
        8, "Rows that go through the model at once, if batches are counted in rows.", usual="1 to 32", advanced=True
    )
    accumulation: int = setting(1, "Batches added up before one optimizer step.", usual="1 to 16", advanced=True)
    max_length: int = setting(512, "Longer rows are cut off at this many tokens.", usual="256 to 4096")
    packing: bool = setting(
        False,
        "Puts several short rows into one sequence; they do not see each other. Worth it when lengths differ much.",
        usual="off",
        advanced=True,
    )
    train_on_prompt: bool = setting(False, "Learn the prompt too, not only the assistant's answers.", usual="off", advanced=True)
    precision: str = setting(
        "auto",
        "bf16 halves memory where the hardware has it; auto picks it there.",
        choices=PRECISIONS,
        advanced=True,
    )
    gradient_checkpointing: bool = setting(
        False, "Computes activations twice to save memory; about a third slower.", usual="off", advanced=True
    )
    seed: int = setting(0, "The same seed, data and machine give the same losses to the bit.", advanced=True)
    eval_interval: int = setting(20, "Measure held-out loss and sample one answer every so many steps.", usual="20 to 200")
    eval_rows: int = setting(100, "How many held-out rows are measured each time.", usual="50 to 500", advanced=True)
    early_stopping: int = setting(
        0,
        "Stop when the held-out loss has not improved in this many measurements; 0 trains to the end.",
        usual="0, or 3 to 5",
        advanced=True,
    )
    save_interval: int = setting(20, "Save a checkpoint every so many steps.", usual="20 to 500")
    final_weights: str = setting(
        "best",
        "The adapter is the checkpoint with the best held-out loss, or the last.",
        choices=FINAL_WEIGHTS,
        advanced=True,
    )
    threads: int = setting(0, "CPU threads; 0 means all cores.", usual="0", advanced=True)

    def __post_init__(self) -> None:
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is in no range
                shown = str(value)[:20]
                raise ConfigError(f"{name} is {shown}; it must be from {low:g} to {high:g}.", field=name)
        if not TARGETS.fullmatch(self.target_modules):
            raise ConfigError(
                "target_modules must be all-linear, or names of letters, digits, dots and _ with commas between them.",
                field="target_modules",
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.", field=name)
        if self.batch_by == "tokens" and self.tokens_per_batch < self.max_length:
            raise ConfigError(
                f"tokens_per_batch is {self.tokens_per_batch}, but one row may be max_length = {self.max_length} tokens; "
                f"raise the first or lower the second.",
                field="tokens_per_batch",
            )
        needed = self.early_stopping * self.eval_interval
        if self.max_steps and needed >= self.max_steps:
            raise ConfigError(
                f"early_stopping is {self.early_stopping} with eval_interval = {self.eval_interval}, so it could stop at step "
                f"{needed} at the earliest, but max_steps is {self.max_steps}; lower the first two or raise the last.",
                field="early_stopping",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check names and types of a JSON object.

        Raises:
            ConfigError: names the field that is unknown or of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"There is no setting {', '.join(unknown)}; known are {', '.join(known)}.", field=unknown[0])
        return cls(**{name: _typed(name, str(known[name].type), value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def warnings(self) -> list[str]:
        """What is allowed but seldom meant, each with the nearest usual value."""
        found = []
        if self.learning_rate > 5e-3:
            found.append(f"learning_rate is {self.learning_rate:g}; above 0.005 the loss usually jumps. 0.001 is a safe start.")
        if self.alpha > 4 * self.rank:
            found.append(
                f"alpha is {self.alpha} with rank {self.rank}: updates count {self.alpha / self.rank:g}-fold; usual is 2."
            )
        if self.max_steps and self.eval_interval > self.max_steps:
            found.append(
                f"eval_interval is {self.eval_interval}, but there are only {self.max_steps} steps: the held-out loss is "
                "measured at the start and the end only."
            )
        if self.epochs > 10 and not self.max_steps and not self.early_stopping:
            found.append(f"epochs is {self.epochs} without early_stopping: the rows will be learned by heart. 1 to 5 is usual.")
        if self.train_on_prompt:
            found.append("train_on_prompt is on: the model also learns to write the questions.")
        return found

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step 1..total_steps: linear warm-up, then the schedule down to zero (or constant)."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        done = (step - warmup) / max(1, total_steps - warmup + 1)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.learning_rate * factor[self.schedule]


# field, lowest, highest
LIMITS: tuple[tuple[str, float, float], ...] = (
    ("rank", 1, 1024),
    ("alpha", 1, 4096),
    ("dropout", 0, 0.9),
    ("learning_rate", 1e-8, 1),
    ("warmup_ratio", 0, 0.9),
    ("weight_decay", 0, 1),
    ("max_grad_norm", 1e-3, 1e6),
    ("epochs", 1, 1000),
    ("max_steps", 0, 10_000_000),
    ("tokens_per_batch", 16, 1_048_576),
    ("rows_per_batch", 1, 4096),
    ("early_stopping", 0, 10_000),
    ("accumulation", 1, 1024),
    ("max_length", 8, 131_072),
    ("seed", 0, 2**31 - 1),
    ("eval_interval", 1, 1_000_000),
    ("eval_rows", 1, 100_000),
    ("save_interval", 1, 1_000_000),
    ("threads", 0, 1024),
)
CHOICES = {
    "method": METHODS,
    "batch_by": BATCHINGS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "final_weights": FINAL_WEIGHTS,
}


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value as the field's type; JSON's 1 is a float where a float is wanted, a bool is never a number."""
    wanted: tuple[type, ...] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}[kind]
    fits: bool = isinstance(value, wanted)
    if not fits or (kind != "bool" and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind}.", field=name)
    if isinstance(value, int) and abs(value) > 2**63:
        raise ConfigError(f"{name} has too many digits.", field=name)
    if kind != "float":
        return value
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name} has too many digits.", field=name) from error
