"""The settings that belong to techniques, and how a setting is declared. No torch here.

Which technique has which of them stands in its row of training/engine/methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from training.errors import ConfigError

TARGET_PATTERN = re.compile(r"[\w.,\- ]{1,500}", re.ASCII)
LAYER_PATTERN = re.compile(r"([\w.\-]{1,80} *= *[1-9]\d{0,3} *(, *|$)){0,50}", re.ASCII)
TUNABLE_SETTINGS = ("learning_rate", "rank", "alpha", "target_modules")
PAPERS = {  # setting -> the papers that it comes from, on arXiv
    "rank": {"LoRA": "2106.09685"},
    "alpha": {"LoRA": "2106.09685"},
    "dropout": {"Dropout": "1207.0580"},
    "target_modules": {"QLoRA": "2305.14314"},
    "init_lora_weights": {
        "PiSSA": "2404.02948",
        "OLoRA": "2406.01775",
        "EVA": "2410.07170",
        "LoftQ": "2310.08659",
    },
    "use_rslora": {"rsLoRA": "2312.03732"},
    "use_dora": {"DoRA": "2402.09353"},
    "loraplus_lr_ratio": {"LoRA+": "2402.12354"},
    "tuning_budget_fraction": {"Successive halving": "1810.05934"},
    "prefix_projection": {"Prefix tuning": "2101.00190"},
    "prompt_tuning_init": {"Prompt tuning": "2104.08691"},
    "bottleneck_size": {"Adapter layers": "1902.00751"},
    "adapter_placement": {"AdapterFusion": "2005.00247"},
    "optim": {"8-bit AdamW": "2110.02861"},
    "gradient_checkpointing": {"Checkpointing": "1604.06174"},
}
INIT_WEIGHTS = (
    "default",
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_4",
    "olora",
    "eva",
    "loftq",
)


def setting_field(
    default: Any,
    description: str,
    *,
    recommended: str = "",
    choices: tuple[str, ...] = (),
    bounds: tuple[float, float] | None = None,
    advanced: bool = False,
) -> Any:
    """A field with the sentence that the launch page prints under it, the range that most stay in,
    and what is allowed.
    """
    metadata = {
        "description": description,
        "recommended": recommended,
        "choices": choices,
        "bounds": bounds,
        "advanced": advanced,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How the model is changed. Sizes are numbers of features or tokens."""

    method: str = "lora"
    model: str = ""  # the base model's folder; prompt tuning reads its tokenizer
    rank: int = setting_field(
        16,
        "Size of the update: more learns more and takes more memory.",
        recommended="8 to 64",
        bounds=(1, 1024),
    )
    alpha: int = setting_field(
        32,
        "Strength of the update; the update is scaled by alpha / rank.",
        recommended="rank to 2 x rank",
        bounds=(1, 4096),
    )
    dropout: float = setting_field(
        0.0,
        "Share of the update's inputs left out at random; raise it when data is little. Costs a "
        "third more time on a CPU.",
        recommended="0 to 0.1",
        bounds=(0, 0.9),
    )
    target_modules: str = setting_field(
        "all-linear",
        "Which layers are adapted: all-linear, or names with commas such as q_proj,v_proj.",
        recommended="all-linear",
        advanced=True,
    )
    init_lora_weights: str = setting_field(
        "default",
        "Where the update starts: default is zero; PiSSA and OLoRA start from the weights, EVA "
        "from the data, LoftQ from what 4 bits lose. They learn faster at first and cost a minute "
        "before the first step.",
        recommended="default",
        choices=INIT_WEIGHTS,
        advanced=True,
    )
    use_rslora: bool = setting_field(
        False,
        "Scales by alpha / sqrt(rank) instead, so that high ranks learn as fast (Kalajdzievski "
        "2023).",
        recommended="off; on above rank 64",
        advanced=True,
    )
    use_dora: bool = setting_field(
        False,
        "Learns each weight's length apart from its direction (Liu et al. 2024); better at low "
        "rank, slower. One batch of answers cannot hold rows of it and of others.",
        recommended="off",
        advanced=True,
    )
    loraplus_lr_ratio: float = setting_field(
        1.0,
        "How much faster the second factor learns than the first (LoRA+, Hayou et al. 2024); 1 is "
        "plain LoRA.",
        recommended="1, or 4 to 16",
        bounds=(1, 64),
        advanced=True,
    )
    rank_pattern: str = setting_field(
        "",
        "Another rank for some layers, such as down_proj=32, v_proj=8.",
        recommended="empty",
        advanced=True,
    )
    alpha_pattern: str = setting_field(
        "",
        "Another alpha for some layers, such as down_proj=64, v_proj=16.",
        recommended="empty",
        advanced=True,
    )
    tuning_budget_fraction: float = setting_field(
        0.0,
        "Share of the run's steps spent on short trials before it: they choose what tuning_search_space "
        "names by held-out loss, and the best one goes on. 0: no trials.",
        recommended="0, or 0.2 to 0.5",
        bounds=(0, 2),
    )
    tuning_budget_minutes: float = setting_field(
        0.0,
        "The same as minutes; they count if both are given. The trial under way when they are "
        "over goes to its end.",
        recommended="0",
        bounds=(0, 10_000),
        advanced=True,
    )
    tuning_search_space: str = setting_field(
        "learning_rate,rank,alpha,target_modules",
        "What the trials vary, with commas.",
        recommended="all four",
        advanced=True,
    )
    num_virtual_tokens: int = setting_field(
        20,
        "Learned tokens in front of every prompt: more can say more and take room.",
        recommended="10 to 100",
        bounds=(1, 1000),
    )
    prefix_projection: bool = setting_field(
        False,
        "Learns the prefix through a small network, thrown away at the end: steadier, slower.",
        recommended="off",
        advanced=True,
    )
    prompt_tuning_init: str = setting_field(
        "text",
        "The learned tokens start as those of a text, or at random. A text learns faster.",
        recommended="text",
        choices=("text", "random"),
    )
    prompt_tuning_init_text: str = setting_field(
        "Follow the instructions and answer as in the examples.",
        "What the learned tokens say before training.",
        recommended="the task",
    )
    bottleneck_size: int = setting_field(
        64,
        "Width of the small layers put in: more learns more and takes more memory.",
        recommended="16 to 256",
        bounds=(1, 4096),
    )
    adapter_placement: str = setting_field(
        "both",
        "Where they stand: after attention and feed-forward (Houlsby), or after feed-forward "
        "alone (Pfeiffer), half the cost.",
        recommended="both",
        choices=("both", "feed-forward"),
    )
    activation: str = setting_field(
        "relu",
        "The curve between down- and up-projection.",
        recommended="relu",
        choices=("relu", "gelu", "silu"),
        advanced=True,
    )


def check_method_settings(config: MethodSettings) -> None:
    """Raises ConfigError: a technique's setting is of the wrong form, or two of them contradict
    each other.
    """
    if not TARGET_PATTERN.fullmatch(config.target_modules):
        raise ConfigError(
            "target_modules must be all-linear, or names of letters, digits, dots and _ with "
            "commas between them.",
            field="target_modules",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not LAYER_PATTERN.fullmatch(getattr(config, name)):
            raise ConfigError(
                f"{name} must be like `down_proj=32, v_proj=8`, whole numbers from 1 to 9999.",
                field=name,
            )
    is_empty = config.prompt_tuning_init == "text" and not config.prompt_tuning_init_text.strip()
    if len(config.prompt_tuning_init_text) > 2000 or is_empty:
        raise ConfigError(
            "prompt_tuning_init_text must be a text of 1 to 2,000 characters, or prompt_tuning_init random.",
            field="prompt_tuning_init_text",
        )
    if config.init_lora_weights == "loftq" and config.method != "qlora":
        raise ConfigError(
            "init_lora_weights is loftq, which starts from what 4 bits lose: it needs method = qlora.",
            field="init_lora_weights",
        )
    changes_base = config.init_lora_weights in ("pissa", "pissa_niter_4", "olora")
    if changes_base and config.method == "qlora":
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}, which changes the base's weights; those of "
            "qlora are 4 bits. Use loftq.",
            field="init_lora_weights",
        )
    if changes_base and (
        config.use_dora or config.use_rslora or config.rank_pattern or config.alpha_pattern
    ):
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}: its adapter is saved as plain LoRA, which "
            "use_rslora, use_dora, rank_pattern and alpha_pattern do not allow.",
            field="init_lora_weights",
        )
    check_tuning_settings(config)
    if config.use_dora and config.init_lora_weights == "eva":
        raise ConfigError(
            "use_dora and init_lora_weights = eva do not go together; switch one off.",
            field="use_dora",
        )


def candidate_ranks(rank: int) -> list[int]:
    """What trials may take instead of a rank."""
    return sorted({max(1, rank // 2), rank, min(1024, 2 * rank)})


def check_tuning_settings(config: MethodSettings) -> None:
    """Raises ConfigError: trials are asked for over something that they cannot vary."""
    tuned_names = [name.strip() for name in config.tuning_search_space.split(",")]
    unknown_names = [name for name in tuned_names if name not in TUNABLE_SETTINGS]
    if unknown_names or not config.tuning_search_space.isascii():
        message = f"tuning_search_space names {unknown_names[0][:40]!r}; trials vary {', '.join(TUNABLE_SETTINGS)}."
        raise ConfigError(message, field="tuning_search_space")
    if (
        config.tuning_budget_fraction or config.tuning_budget_minutes
    ) and config.init_lora_weights != "default":
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}, which changes or reads the base: trials "
            "share one base and need default.",
            field="init_lora_weights",
        )


def parse_layer_pattern(text: str) -> dict[str, int]:
    """`down_proj=32, v_proj=8` as PEFT wants it."""
    pairs = (part.split("=") for part in text.split(",") if part.strip())
    return {name.strip(): int(number) for name, number in pairs}


def check_text(name: str, text: str) -> None:
    """Raises ConfigError: half of a surrogate pair, or NUL, which no database stores."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} has characters that are no text.", field=name) from error
    if "\0" in text:
        raise ConfigError(f"{name} has a NUL character; take it out.", field=name)


def coerce_value(name: str, kind: str, value: Any) -> Any:
    """The value as the field's type; JSON's 1 is a float where a float is wanted, a bool is never a
    number.
    """
    accepted_types: tuple[type, ...] = {
        "str": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
    }[kind]
    is_accepted: bool = isinstance(value, accepted_types)
    if not is_accepted or (kind != "bool" and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind}.", field=name)
    if isinstance(value, int) and abs(value) > 2**63:
        raise ConfigError(f"{name} has too many digits.", field=name)
    if isinstance(value, str):
        check_text(name, value)
    if kind != "float":
        return value
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name} has too many digits.", field=name) from error
