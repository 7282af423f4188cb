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
# Keys copied by method. Keys that PEFT always writes are ignored, since the config is written anew;
# any other key that is set is an error.
ALLOWED_KEYS: dict[str, tuple[str, ...]] = {
    "lora": (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "alpha_pattern",
    ),
    "ia3": ("fan_in_fan_out",),
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
    "peft_type",
    "task_type",
    "auto_mapping",
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
    "lora_ga_config",
    "qalora_group_size",
    "num_transformer_submodules",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "feedforward_modules",
}
# Values that PEFT always writes
DEFAULT_VALUES = {"megatron_core": ("megatron.core",), "bias": ("none",)}
# What the settings add that SnapML cannot serve or merge
UNSUPPORTED_FEATURES = {
    "modules_to_save": "fully trained copies of modules",
    "trainable_token_indices": "trained rows of the embedding",
    "bias": "trained biases",
    "lora_bias": "trained biases of the LoRA matrices",
    "layer_replication": "repeated layers",
    "target_parameters": "LoRA on parameters that are no modules",
    "ensure_weight_tying": "adapters that are tied like the weights",
    "alora_invocation_tokens": "activated LoRA",
}
# Initializations of PEFT that leave the base unchanged. The others subtract from it, so that their
# matrices belong to a residual.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that are lists of names, or a single one
NAME_LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")
DEFAULT_RANK = 8  # PEFT's
MAX_ALPHA = 1e6
LAYER_INDEX_PATTERN = re.compile(r".*?\.[^.]*\.(\d+)\.")
TENSOR_PATTERNS = {
    "lora": re.compile(
        r"(?P<module>[\w.]+)\.lora_(?P<part>A|B)\.weight"
        r"|(?P<embedding>[\w.]+)\.lora_embedding_(?P<embedding_part>A|B)"
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
    """The config reduced to known keys. Target modules, ranks and IA3's feedforward modules are
    taken from the tensors.

    Raises:
        UserError: an unknown setting, a tensor that does not belong to such an adapter, or a size
            that does not fit.
    """
    check_value_types(config)
    accepted = {name: config[name] for name in ALLOWED_KEYS[method] if config.get(name) is not None}
    if method == "lora":
        accepted.setdefault("r", DEFAULT_RANK)
    check_config_values({**accepted, "rank_pattern": config.get("rank_pattern")})
    modules = {parse_tensor_name(name, method)[0]: None for name in shapes}
    for name, shape in shapes.items():
        check_tensor_shape(name, shape, method, (config, base))
    check_modules_targeted(config, modules)
    if method == "lora":
        check_matrices(config, modules, shapes)
        ranks = {module: get_rank(module, config) for module in sorted(modules)}
        accepted["rank_pattern"] = {
            module: rank for module, rank in ranks.items() if rank != accepted["r"]
        }
    if method in ("lora", "ia3", "bottleneck"):
        accepted["target_modules"] = sorted(modules)
    if method == "ia3":
        # A feedforward module scales its input: its vector is a row
        accepted["feedforward_modules"] = sorted(
            parse_tensor_name(name, method)[0] for name, shape in shapes.items() if shape[0] == 1
        )
    return {
        "peft_type": config["peft_type"],
        "task_type": "CAUSAL_LM",
        **accepted,
        "inference_mode": True,
        **({"bias": "none", "init_lora_weights": True} if method == "lora" else {}),
    }


def check_supported(config: Mapping[str, Any], method: str) -> None:
    """Raises UserError: the config sets something that SnapML does not support."""
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"The adapter is for the task {str(config['task_type'])[:40]}; only CAUSAL_LM is "
            "supported.",
            field="file",
            code="unsupported_task",
        )
    for key, value in config.items():
        if (
            key not in ALLOWED_KEYS[method]
            and key not in IGNORED_KEYS
            and value
            and value not in DEFAULT_VALUES.get(key, ())
        ):
            feature = UNSUPPORTED_FEATURES.get(key)
            raise UserError(
                f"adapter_config.json sets {key[:60]}{f' ({feature})' if feature else ''}, which "
                "SnapML does not support. Merge the adapter into its base with PEFT's "
                "`merge_and_unload` and register the result as a model instead.",
                field="file",
                code="unsupported_setting",
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"The adapter was trained with init_lora_weights {init[:40]}, which also changes the "
            "base: its matrices do not fit the original model. Save it as plain LoRA with PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`.",
            field="file",
            code="base_changing_init",
        )
    if init not in PLAIN_INITS:
        raise UserError(
            f"adapter_config.json sets init_lora_weights to {str(init)[:40]!r}, which SnapML does "
            "not know.",
            field="file",
            code="unsupported_setting",
        )


def check_modules_targeted(config: Mapping[str, Any], modules: Collection[str]) -> None:
    """Raises UserError: the weights have a module that the config leaves out, so that PEFT would
    ignore it. A regular expression is not checked: it could take hours.
    """
    for module in modules:
        if not is_targeted(module, config):
            raise UserError(
                f"The adapter has weights for {module[:80]!r}, but target_modules, "
                "layers_to_transform or exclude_modules in adapter_config.json leave it out, so "
                "PEFT would ignore them. Correct adapter_config.json.",
                field="file",
                code="untargeted_module",
            )


def is_targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt a module, by the lists of names and layers in the config."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(excluded, list) and ends_with_name(module, excluded):
        return False
    if not isinstance(targets, list):
        return True
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return ends_with_name(module, targets)
    layer_index = find_layer_index(module, config.get("layers_pattern"))
    indices = layers if isinstance(layers, list) else [layers]
    # As in PEFT, layers_to_transform does not apply to a module that is named in full
    return module in targets or (ends_with_name(module, targets) and layer_index in indices)


def ends_with_name(module: str, names: Collection[Any]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def find_layer_index(module: str, layers_pattern: Any) -> int | None:
    """The number of the layer that a module is in, after one of the names in `layers_pattern`."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    patterns = [re.compile(rf"(?:^|.*?\.){re.escape(str(name))}\.(\d+)\.") for name in names or ()]
    matches = [pattern.match(module) for pattern in patterns or [LAYER_INDEX_PATTERN]]
    return next((int(match[1]) for match in matches if match), None)


def get_rank(module: str, config: Mapping[str, Any]) -> Any:
    """The rank of a module, by the first name in `rank_pattern` that it ends with."""
    pattern = config.get("rank_pattern") or {}
    ranks = (rank for name, rank in pattern.items() if ends_with_name(module, [name]))
    return next(ranks, config.get("r", DEFAULT_RANK))


def check_matrices(
    config: Mapping[str, Any], modules: Collection[str], shapes: Mapping[str, list[int]]
) -> None:
    """Raises UserError: a LoRA matrix is missing, or PEFT would ignore DoRA's magnitudes."""
    missing = [module for module in modules if not has_both_matrices(module, shapes)]
    if missing:
        raise UserError(
            f"The adapter has only one of the two LoRA matrices for {missing[0][:80]!r}.",
            field="file",
            code="unpaired_matrix",
        )
    if not config.get("use_dora") and any("lora_magnitude_vector" in name for name in shapes):
        raise UserError(
            "The adapter has magnitudes of DoRA, but use_dora in adapter_config.json is not true, "
            "so PEFT would ignore them. Correct adapter_config.json.",
            field="file",
            code="unused_magnitudes",
        )


def check_value_types(config: Mapping[str, Any]) -> None:
    """Raises UserError: a setting has a value of another type than PEFT writes."""
    layers = config.get("layers_to_transform")
    is_valid = {
        name: isinstance(value, str) or (isinstance(value, list) and all_are(value, str))
        for name in NAME_LISTS
        if (value := config.get(name)) is not None
    }
    is_valid |= {name: config.get(name) in (None, True, False) for name in SWITCHES}
    is_valid["layers_to_transform"] = all_are(layers if isinstance(layers, list) else [layers], int)
    is_valid["layers_to_transform"] |= layers is None
    for name, value_is_valid in is_valid.items():
        if not value_is_valid:
            raise UserError(
                f"adapter_config.json sets {name} to {str(config[name])[:40]}, which PEFT does not "
                "write.",
                field="file",
                code="invalid_value",
            )


def all_are(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


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
    alpha = config.get("lora_alpha", 1)
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise UserError(
            f"adapter_config.json sets lora_alpha to {str(alpha)[:40]}; it must be a number above "
            f"0, up to {MAX_ALPHA:,.0f}.",
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
                f"{name} in adapter_config.json must map module names to numbers. Regular "
                "expressions are not supported: write the names of the modules.",
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
            f"Tensor {name[:80]!r} does not belong to this type of adapter, which SnapML does not "
            "support. Merge the adapter into its base with PEFT's `merge_and_unload` and register "
            "the result as a model instead.",
            field="file",
            code="unknown_tensor",
        )
    groups = match.groupdict()
    module = groups.get("module") or groups.get("embedding") or groups.get("other") or ""
    return module, groups.get("part") or groups.get("embedding_part") or ""


def has_both_matrices(module: str, shapes: Mapping[str, list[int]]) -> bool:
    names = {name.removeprefix(TENSOR_PREFIX) for name in shapes}
    return {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= names or {
        f"{module}.lora_embedding_A",
        f"{module}.lora_embedding_B",
    } <= names


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
        expected_rank = get_rank(module, config)
        first, last = (shape[0], shape[1]) if len(shape) == 2 else (None, None)
        rank, width = (first, last) if part == "A" else (last, first)
        if rank != expected_rank or width not in weight:
            raise UserError(
                f"The adapter's {part} for {module[:80]} has shape {shape}, which does not fit "
                f"rank {expected_rank} and the weight of shape {weight} in {base.name}. Choose "
                "the base model it was trained on.",
                field="base",
                code="wrong_shape",
            )
    elif not shape or not all(
        size in (1, config.get("bottleneck_size"), *weight) for size in shape
    ):
        raise UserError(
            f"The adapter's tensor for {module[:80]} does not fit {base.name}. Choose the base "
            "model it was trained on.",
            field="base",
            code="wrong_shape",
        )
