"""Check that an imported adapter fits its base model and that its config sets nothing unknown. Pure
functions that read no tensors.

PEFT passes unknown parameters on to the base model, some initializations change the base's weights
while loading, and PEFT allocates the sizes in the config before it reads the file. The config is
therefore rebuilt from known keys and from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import UserError

TENSOR_PREFIX = "base_model.model."
MAX_SIZE = 4096  # of rank, virtual tokens, bottleneck size
# Keys copied by method. Keys that PEFT always writes are ignored; any other key that is set is an
# error.
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
# Values that PEFT always writes
DEFAULT_VALUES = {"megatron_core": ("megatron.core",), "bias": ("none",)}
TENSOR_PATTERNS = {
    "lora": re.compile(
        r"(?P<module>[\w.]+)\.lora_(?P<part>A|B)\.weight"
        r"|(?P<other>[\w.]+)\.lora_magnitude_vector(\.weight)?"
    ),
    "ia3": re.compile(r"(?P<module>[\w.]+)\.ia3_l"),
    "bottleneck": re.compile(r"(?P<module>[\w.]+)\.bottleneck_(?P<part>down|up)\.(weight|bias)"),
    "prefix": re.compile(r"prompt_embeddings"),
    "prompt": re.compile(r"prompt_embeddings"),
}


def find_weight_name(module: str, names: Collection[str]) -> str | None:
    """The name of a module's weight in the base's files. GPT-2 files on the Hub omit the
    `transformer.` prefix, and a tied head is stored as the embeddings.
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
    """The name of a base model and the shapes of its weights."""

    name: str
    shapes: Mapping[str, list[int]]

    def get_weight_shape(self, module: str) -> list[int]:
        """Raises UserError if the base has no such 2-dimensional weight."""
        name = find_weight_name(module, self.shapes)
        shape = self.shapes[name] if name else None
        if shape is None or len(shape) != 2:
            raise UserError(
                f"{self.name} has no weight {module[:80]!r}, which the adapter changes. Choose the "
                "base model it was trained on.",
                field="base",
                code="unknown_module",
            )
        return shape


def validate_config(
    config: Mapping[str, Any], method: str, shapes: Mapping[str, list[int]], base: BaseShapes
) -> dict[str, Any]:
    """The config reduced to known keys, with target modules taken from the tensors.

    Raises:
        UserError: an unknown setting, a tensor that does not belong to such an adapter, or a size
            that does not fit.
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
                f"adapter_config.json sets {key[:60]}, which is not supported. Save the adapter "
                "without it.",
                field="file",
                code="unsupported_setting",
            )
    check_config_values(accepted)
    modules = {parse_tensor_name(name, method)[0]: None for name in shapes}
    for name, shape in shapes.items():
        check_tensor_shape(name, shape, method, (accepted, base))
    if method == "lora":
        missing = [module for module in modules if not has_both_matrices(module, shapes)]
        if missing:
            raise UserError(
                f"The adapter has only one of the two LoRA matrices for {missing[0][:80]!r}.",
                field="file",
                code="unpaired_matrix",
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
    """Raises UserError for a size that is not an integer within its limit, or a pattern that is not
    a map of module names to numbers.
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
                f"adapter_config.json sets {name} to {str(value)[:40]}; it must be an integer from "
                f"1 to {max_value:,}.",
                field="file",
                code="invalid_size",
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
                f"{name} in adapter_config.json must map module names to numbers.",
                field="file",
                code="invalid_pattern",
            )


def parse_tensor_name(name: str, method: str) -> tuple[str, str]:
    """Return (module, part). Raises UserError for a tensor that does not belong to such
    an adapter.
    """
    match = TENSOR_PATTERNS[method].fullmatch(name.removeprefix(TENSOR_PREFIX))
    if match is None:
        raise UserError(
            f"Tensor {name[:80]!r} does not belong to this type of adapter; it would overwrite "
            "base weights.",
            field="file",
            code="unknown_tensor",
        )
    groups = match.groupdict()
    return groups.get("module") or groups.get("other") or "", groups.get("part") or ""


def has_both_matrices(module: str, shapes: Mapping[str, list[int]]) -> bool:
    names = {name.removeprefix(TENSOR_PREFIX) for name in shapes}
    return {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= names


def check_tensor_shape(
    name: str, shape: list[int], method: str, expected: tuple[Mapping[str, Any], BaseShapes]
) -> None:
    """Raises UserError for a tensor whose shape fits neither the base's weight nor the config."""
    config, base = expected
    module, part = parse_tensor_name(name, method)
    if method in ("prefix", "prompt"):
        if not shape or shape[0] != config.get("num_virtual_tokens"):
            raise UserError(
                f"The adapter has {shape[0] if shape else 0} virtual tokens, but its config says "
                f"{config.get('num_virtual_tokens')}.",
                field="file",
                code="wrong_shape",
            )
        return
    weight = base.get_weight_shape(module)
    if method == "lora" and part:
        ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
        rank, width = (shape[0], shape[-1]) if part == "A" else (shape[-1], shape[0])
        if len(shape) != 2 or rank not in ranks or width not in weight:
            raise UserError(
                f"The adapter's {part} for {module[:80]} has shape {shape}, which fits neither "
                f"rank {config.get('r')} nor the weight of shape {weight} in {base.name}. Choose "
                "the base model it was trained on.",
                field="base",
                code="wrong_shape",
            )
    elif not all(size in (1, config.get("bottleneck_size"), *weight) for size in shape):
        raise UserError(
            f"The adapter's tensor for {module[:80]} does not fit {base.name}. Choose the base "
            "model it was trained on.",
            field="base",
            code="wrong_shape",
        )
