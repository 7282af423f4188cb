"""Does an adapter from elsewhere fit its base, and does its config say nothing but what is known?
Pure; it reads no tensor.

PEFT passes unknown parameters on to the base, starts of another kind change the base's weights
while they are loaded, and sizes in the config are allocated before the file is read. So the config
is written anew, from what is known and from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import UserError

TENSOR_PREFIX = "base_model.model."
MAX_SIZE = 4096  # rank, virtual tokens, or a bottleneck's size
# What may be set, by method; all other keys are dropped where PEFT writes them by itself, and
# refused where they say something.
COMMON_KEYS = ("peft_type", "task_type")
ALLOWED_KEYS: dict[str, tuple[str, ...]] = {
    "lora": (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
    ),
    "ia3": ("feedforward_modules", "fan_in_fan_out"),
    "prefix": (
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "encoder_hidden_size",
    ),
    "prompt": ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    "bottleneck": ("bottleneck_size", "activation"),
}
IGNORED_KEYS = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "init_ia3_weights",
    "eva_config",
    "loftq_config",
    "corda_config",
    "qalora_group_size",
    "num_transformer_submodules",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "target_modules",
    "exclude_modules",
}
DEFAULT_VALUES = {
    "megatron_core": ("megatron.core",),
    "bias": ("none",),
}  # what PEFT writes, used or not
TENSOR_PATTERNS = {
    "lora": re.compile(
        r"(?P<module>[\w.]+)\.lora_(?P<part>A|B)\.weight|(?P<other>[\w.]+)\.lora_magnitude_vector(\.weight)?"
    ),
    "ia3": re.compile(r"(?P<module>[\w.]+)\.ia3_l"),
    "bottleneck": re.compile(r"(?P<module>[\w.]+)\.bottleneck_(?P<part>down|up)\.(weight|bias)"),
    "prefix": re.compile(r"prompt_embeddings"),
    "prompt": re.compile(r"prompt_embeddings"),
}


def find_weight_name(module: str, names: Collection[str]) -> str | None:
    """What a base's files call the weight of a module: GPT-2's on the hub leave its prefix out, a
    tied head is the embeddings.
    """
    without_prefix = module.removeprefix("transformer.")
    tied = (
        [name for name in names if name.endswith(("embed_tokens.weight", "wte.weight"))]
        if module == "lm_head"
        else []
    )
    return next(
        (name for name in (f"{module}.weight", f"{without_prefix}.weight", *tied) if name in names),
        None,
    )


@dataclass(frozen=True)
class BaseShapes:
    """A base's name and the shapes of its weights."""

    name: str
    shapes: Mapping[str, list[int]]

    def get_weight_shape(self, module: str) -> list[int]:
        """Raises UserError: the base has no such weight."""
        name = find_weight_name(module, self.shapes)
        shape = self.shapes[name] if name else None
        if shape is None or len(shape) != 2:
            raise UserError(
                f"{self.name} has no weight {module[:80]!r}, which the adapter changes; choose "
                "its true base.",
                field="base",
            )
        return shape


def validated_config(
    config: Mapping[str, Any], method: str, shapes: Mapping[str, list[int]], base: BaseShapes
) -> dict[str, Any]:
    """The config as it may be kept.

    Raises:
        UserError: a setting that is not known, a parameter that is no part of such an adapter, or a
            size that does not fit.
    """
    accepted = {
        name: config[name] for name in (*COMMON_KEYS, *ALLOWED_KEYS[method]) if name in config
    }
    for key, value in config.items():
        if (
            key not in accepted
            and key not in IGNORED_KEYS
            and value
            and value not in DEFAULT_VALUES.get(key, ())
        ):
            raise UserError(
                f"adapter_config.json sets {key[:60]}, which is not taken; save the adapter "
                "without it.",
                field="file",
            )
    check_config_values(accepted)
    modules = {parse_tensor_name(name, method)[0]: None for name in shapes}
    for name, shape in shapes.items():
        check_tensor_shape(name, shape, method, (accepted, base))
    if method == "lora":
        missing = [module for module in modules if not has_both_matrices(module, shapes)]
        if missing:
            raise UserError(
                f"The adapter has only one of its two matrices for {missing[0][:80]!r}.",
                field="file",
            )
    if method in ("lora", "ia3", "bottleneck"):
        accepted["target_modules"] = sorted(modules)
    if method == "ia3":
        suffixes = tuple(str(end) for end in config.get("feedforward_modules") or ())
        accepted["feedforward_modules"] = [
            module for module in sorted(modules) if module.endswith(suffixes)
        ]
    return {
        **accepted,
        "inference_mode": True,
        **({"bias": "none", "init_lora_weights": True} if method == "lora" else {}),
    }


def check_config_values(config: Mapping[str, Any]) -> None:
    """Raises UserError: a number that is none, or beyond LARGEST; a pattern that is more than names
    and numbers.
    """
    for name in (
        "r",
        "num_virtual_tokens",
        "bottleneck_size",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "encoder_hidden_size",
    ):
        value, max_value = (
            config.get(name),
            MAX_SIZE if name in ("r", "num_virtual_tokens", "bottleneck_size") else 1_000_000,
        )
        if value is not None and (type(value) is not int or not 1 <= value <= max_value):
            raise UserError(
                f"adapter_config.json sets {name} to {str(value)[:40]}; it must be a whole number "
                f"up to {max_value:,}.",
                field="file",
            )
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        is_valid = isinstance(pattern, dict) and all(
            re.fullmatch(r"[\w.]{1,200}", str(key))
            and type(value) in (int, float)
            and 0 < value <= MAX_SIZE
            for key, value in pattern.items()
        )
        if not is_valid:
            raise UserError(
                f"adapter_config.json's {name} must name modules with a number each.", field="file"
            )


def parse_tensor_name(name: str, method: str) -> tuple[str, str]:
    """(module, which of its parts). Raises UserError: no part of an adapter of this kind."""
    match = TENSOR_PATTERNS[method].fullmatch(name.removeprefix(TENSOR_PREFIX))
    if match is None:
        raise UserError(
            f"The tensor {name[:80]!r} is no part of such an adapter; it would change the base "
            "itself.",
            field="file",
        )
    groups = match.groupdict()
    return groups.get("module") or groups.get("other") or "", groups.get("part") or ""


def has_both_matrices(module: str, shapes: Mapping[str, list[int]]) -> bool:
    names = {name.removeprefix(TENSOR_PREFIX) for name in shapes}
    return {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= names


def check_tensor_shape(
    name: str, shape: list[int], method: str, expected: tuple[Mapping[str, Any], BaseShapes]
) -> None:
    """Raises UserError: the tensor has another size than its place in the base, or than the config
    says.
    """
    config, base = expected
    module, part = parse_tensor_name(name, method)
    if method in ("prefix", "prompt"):
        if not shape or shape[0] != config.get("num_virtual_tokens"):
            raise UserError(
                f"The adapter holds {shape[:1]} virtual tokens, and its config says "
                f"{config.get('num_virtual_tokens')}.",
                field="file",
            )
        return
    weight = base.get_weight_shape(module)
    if method == "lora" and part:
        ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
        rank, width = (shape[0], shape[-1]) if part == "A" else (shape[-1], shape[0])
        if len(shape) != 2 or rank not in ranks or width not in weight:
            raise UserError(
                f"The adapter's {part} for {module[:80]} is {shape}: that fits neither rank "
                f"{config.get('r')} nor the weight of {weight} in {base.name}. Choose its true "
                "base.",
                field="base",
            )
    elif not all(size in (1, config.get("bottleneck_size"), *weight) for size in shape):
        raise UserError(
            f"The adapter's part of {module[:80]} does not fit {base.name}; choose its true base.",
            field="base",
        )
