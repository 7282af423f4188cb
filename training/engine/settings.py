"""The settings of the methods, and how a setting is declared. Does not import torch.

The `SPEC` of each method in training/engine/methods lists the settings that it has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from training.errors import ConfigError
from training.text_input import InvalidInput, check_number, check_text

TARGET_PATTERN = re.compile(r"[\w.,\- ]{1,500}", re.ASCII)
LAYER_PATTERN = re.compile(r"([\w.\-]{1,80} *= *[1-9]\d{0,3} *(, *|$)){0,50}", re.ASCII)
TUNABLE_SETTINGS = ("learning_rate", "rank", "alpha", "target_modules")
PAPERS = {  # setting -> papers that introduced it, as arXiv ids
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
    "bottleneck_size": {"Bottleneck adapters": "1902.00751"},
    "adapter_placement": {"AdapterFusion": "2005.00247"},
    "optim": {"8-bit AdamW": "2110.02861"},
    "gradient_checkpointing": {"Checkpointing": "1604.06174"},
}
# Initializations that subtract the adapter's initial value from the base weights
BASE_CHANGING_INITS = ("pissa", "pissa_niter_4", "olora")
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
    """A dataclass field with metadata for the launch page and for validation: help text,
    recommended values, choices, and the inclusive bounds.
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
    """The settings that define what is trained. Sizes are numbers of features or tokens."""

    method: str = "lora"
    model: str = ""  # the base model's folder; prompt tuning reads its tokenizer
    rank: int = setting_field(
        16,
        "Rank of the update matrices. A higher rank can learn more and needs more memory.",
        recommended="8 to 64",
        bounds=(1, 1024),
    )
    alpha: int = setting_field(
        32,
        "Scale of the update, which is multiplied by alpha / rank.",
        recommended="rank to 2 x rank",
        bounds=(1, 4096),
    )
    dropout: float = setting_field(
        0.0,
        "Fraction of the update's inputs that is dropped at random. Raise it for small datasets. "
        "About a third slower on a CPU.",
        recommended="0 to 0.1",
        bounds=(0, 0.9),
    )
    target_modules: str = setting_field(
        "all-linear",
        "Layers that are adapted: all-linear, or comma-separated names such as q_proj,v_proj.",
        recommended="all-linear",
        advanced=True,
    )
    init_lora_weights: str = setting_field(
        "default",
        "Initialization of the adapter. default starts at zero change; PiSSA and OLoRA use the "
        "base weights, EVA the data, and LoftQ the quantization error. The last four learn faster "
        "at first, but take up to a minute before the first step.",
        recommended="default",
        choices=INIT_WEIGHTS,
        advanced=True,
    )
    use_rslora: bool = setting_field(
        False,
        "Scales the update by alpha / sqrt(rank), so that high ranks do not learn more slowly "
        "(Kalajdzievski 2023).",
        recommended="off; on above rank 64",
        advanced=True,
    )
    use_dora: bool = setting_field(
        False,
        "Learns magnitude and direction of each weight separately (Liu et al. 2024). Better at low "
        "ranks, but slower. At inference, a batch cannot combine it with other adapters.",
        recommended="off",
        advanced=True,
    )
    loraplus_lr_ratio: float = setting_field(
        1.0,
        "Ratio of the learning rates of matrices B and A (LoRA+, Hayou et al. 2024). 1 is plain "
        "LoRA.",
        recommended="1, or 4 to 16",
        bounds=(1, 64),
        advanced=True,
    )
    rank_pattern: str = setting_field(
        "",
        "A different rank for some layers, such as down_proj=32, v_proj=8.",
        recommended="empty",
        advanced=True,
    )
    alpha_pattern: str = setting_field(
        "",
        "A different alpha for some layers, such as down_proj=64, v_proj=16.",
        recommended="empty",
        advanced=True,
    )
    tuning_budget_fraction: float = setting_field(
        0.0,
        "Steps for short tuning trials before the run, as a fraction of the run's steps. The "
        "trials vary the settings in tuning_search_space, and training continues from the one with "
        "the best held-out loss. 0 disables tuning.",
        recommended="0, or 0.2 to 0.5",
        bounds=(0, 2),
    )
    tuning_budget_minutes: float = setting_field(
        0.0,
        "Time for the tuning trials in minutes. Takes precedence over tuning_budget_fraction. A "
        "trial that is running when the time is over is completed.",
        recommended="0",
        bounds=(0, 10_000),
        advanced=True,
    )
    tuning_search_space: str = setting_field(
        "learning_rate,rank,alpha,target_modules",
        "Settings that the tuning trials vary, comma-separated.",
        recommended="all four",
        advanced=True,
    )
    num_virtual_tokens: int = setting_field(
        20,
        "Number of learned tokens in front of every prompt. More tokens can express more, but use "
        "up context length.",
        recommended="10 to 100",
        bounds=(1, 1000),
    )
    prefix_projection: bool = setting_field(
        False,
        "Learns the prefix through a small network that is discarded after training. More stable, "
        "but slower.",
        recommended="off",
        advanced=True,
    )
    prompt_tuning_init: str = setting_field(
        "text",
        "Initialization of the virtual tokens: from the tokens of a text, or random. A text learns "
        "faster.",
        recommended="text",
        choices=("text", "random"),
    )
    prompt_tuning_init_text: str = setting_field(
        "Follow the instructions and answer as in the examples.",
        "Text that initializes the virtual tokens.",
        recommended="the task",
    )
    bottleneck_size: int = setting_field(
        64,
        "Width of the inserted layers. Wider layers can learn more and need more memory.",
        recommended="16 to 256",
        bounds=(1, 4096),
    )
    adapter_placement: str = setting_field(
        "both",
        "Where the layers are inserted: after attention and feed-forward (Houlsby), or only after "
        "feed-forward (Pfeiffer) at half the cost.",
        recommended="both",
        choices=("both", "feed-forward"),
    )
    activation: str = setting_field(
        "relu",
        "Activation between the down- and up-projection.",
        recommended="relu",
        choices=("relu", "gelu", "silu"),
        advanced=True,
    )


def check_method_settings(config: MethodSettings) -> None:
    """Raises ConfigError: a setting of the method is malformed, or two of them contradict each
    other.
    """
    if not TARGET_PATTERN.fullmatch(config.target_modules):
        raise ConfigError(
            "target_modules must be all-linear, or comma-separated names of letters, digits, dots, "
            "hyphens and underscores.",
            field="target_modules",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not LAYER_PATTERN.fullmatch(getattr(config, name)):
            raise ConfigError(
                f"{name} must look like `down_proj=32, v_proj=8`, with integers from 1 to 9999.",
                field=name,
            )
    is_empty = config.prompt_tuning_init == "text" and not config.prompt_tuning_init_text.strip()
    if len(config.prompt_tuning_init_text) > 2000 or is_empty:
        raise ConfigError(
            "prompt_tuning_init_text must have 1 to 2,000 characters. For no text, set "
            "prompt_tuning_init = random.",
            field="prompt_tuning_init_text",
        )
    if config.init_lora_weights == "loftq" and config.method != "qlora":
        raise ConfigError(
            "init_lora_weights = loftq compensates quantization error, so it needs method = qlora.",
            field="init_lora_weights",
        )
    changes_base = config.init_lora_weights in BASE_CHANGING_INITS
    if changes_base and config.method == "qlora":
        raise ConfigError(
            f"init_lora_weights = {config.init_lora_weights} changes the base weights, which qlora "
            "quantizes to 4 bits. Use loftq.",
            field="init_lora_weights",
        )
    if changes_base and (
        config.use_dora or config.use_rslora or config.rank_pattern or config.alpha_pattern
    ):
        raise ConfigError(
            f"init_lora_weights = {config.init_lora_weights} saves the adapter as plain LoRA, so "
            "it cannot be combined with use_rslora, use_dora, rank_pattern or alpha_pattern.",
            field="init_lora_weights",
        )
    check_tuning_settings(config)
    if config.use_dora and config.init_lora_weights == "eva":
        raise ConfigError(
            "use_dora cannot be combined with init_lora_weights = eva. Turn one of them off.",
            field="use_dora",
        )


def list_candidate_ranks(rank: int) -> list[int]:
    """Return the ranks that tuning trials may use for a configured rank."""
    return sorted({max(1, rank // 2), rank, min(1024, 2 * rank)})


def check_tuning_settings(config: MethodSettings) -> None:
    """Raises ConfigError: tuning_search_space has a setting that trials cannot vary, or tuning is
    on and init_lora_weights is not default.
    """
    tuned_names = [name.strip() for name in config.tuning_search_space.split(",")]
    unknown_names = [name for name in tuned_names if name not in TUNABLE_SETTINGS]
    if unknown_names or not config.tuning_search_space.isascii():
        message = (
            f"tuning_search_space has {unknown_names[0][:40]!r}, but trials can vary only "
            f"{', '.join(TUNABLE_SETTINGS)}."
        )
        raise ConfigError(message, field="tuning_search_space")
    if (
        config.tuning_budget_fraction or config.tuning_budget_minutes
    ) and config.init_lora_weights != "default":
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}, but tuning trials share one base "
            "model and need init_lora_weights = default.",
            field="init_lora_weights",
        )


def parse_layer_pattern(text: str) -> dict[str, int]:
    """Parse `down_proj=32, v_proj=8` into a dict for PEFT."""
    pairs = (part.split("=") for part in text.split(",") if part.strip())
    return {name.strip(): int(number) for name, number in pairs}


def coerce_value(name: str, kind: str, value: Any) -> Any:
    """Return the value as the type named `kind`. An int is accepted as a float and 1.0 as an int,
    but a bool never as a number.

    Raises:
        ConfigError: the value has another type or is out of range for it.
    """
    accepted_types: tuple[type, ...] = {
        "str": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
    }[kind]
    if kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)  # as YAML and JavaScript write 1.0
    is_accepted: bool = isinstance(value, accepted_types)
    if not is_accepted or (kind != "bool" and isinstance(value, bool)):
        wanted = {"str": "text", "int": "a whole number", "bool": "true or false"}
        message = f"{name} is {value!r:.80}, but must be {wanted.get(kind, 'a number')}."
        raise ConfigError(message, field=name)
    try:
        if isinstance(value, str):
            check_text(value, name)
        elif isinstance(value, int):  # the bounds of a float name its value
            check_number(value, name)
    except InvalidInput as error:
        raise ConfigError(error.message, field=name) from error
    return float(value) if kind == "float" else value
