"""Check that an imported adapter fits its base model and that its config sets nothing unknown. Pure
functions that read no tensors.

PEFT passes unknown parameters on to the base model, some initializations change the base's weights
while loading, and PEFT allocates the sizes in the config before it reads the file. The config is
therefore rebuilt from known keys and from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from adapters.registry.base_shapes import BaseShapes
from training.errors import UserError

MAX_BYTES = 2 * 10**9  # of an adapter's weights
TENSOR_PREFIX = "base_model.model."
MAX_SIZE, MAX_DIMENSION = 4096, 1_000_000
# Of the sizes in the config
MAX_SIZES = {
    "r": MAX_SIZE,
    "num_virtual_tokens": MAX_SIZE,
    "bottleneck_size": MAX_SIZE,
    "token_dim": MAX_DIMENSION,
    "num_layers": MAX_DIMENSION,
    "num_attention_heads": MAX_DIMENSION,
    "encoder_hidden_size": MAX_DIMENSION,
}
MAX_ALPHA = 1e6
PROMPT_METHODS = ("prefix", "prompt")
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
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prefix_projection",  # the saved prefix is already projected
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
LAYER_INDEX_PATTERN = re.compile(r".*?\.[^.]*\.(\d+)\.")
TENSOR_PATTERNS = {
    "lora": re.compile(
        r"(?P<module>[\w.]+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]"
        r"|lora_magnitude_vector)((?<=vector)\.weight)?"
    ),
    "ia3": re.compile(r"(?P<module>[\w.]+)\.(?P<part>ia3_l)"),
    "bottleneck": re.compile(r"(?P<module>[\w.]+)\.(?P<part>bottleneck_(down|up)\.(weight|bias))"),
    "prefix": re.compile(r"prompt_embeddings"),
    "prompt": re.compile(r"prompt_embeddings"),
}


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
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or ()
    patterns = [
        re.compile(rf"(?:^|.*?\.){re.escape(str(name))}\.(\d+)\.") for name in names if name
    ]
    matches = [pattern.match(module) for pattern in patterns or [LAYER_INDEX_PATTERN]]
    return next((int(match[1]) for match in matches if match), None)


def get_rank(module: str, config: Mapping[str, Any]) -> Any:
    """The rank of a module, by the first name in `rank_pattern` that it ends with."""
    pattern = config.get("rank_pattern") or {}
    ranks = (rank for name, rank in pattern.items() if ends_with_name(module, [name]))
    return next(ranks, config.get("r") or DEFAULT_RANK)


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
    """Raises UserError for a size or an alpha outside its limits, or a pattern that is not a map of
    module names to such numbers.
    """
    for name, max_size in MAX_SIZES.items():
        if name in config:
            check_size(config[name], name, max_size)
    if "lora_alpha" in config:
        check_alpha(config["lora_alpha"], "lora_alpha")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        names = pattern if isinstance(pattern, dict) else [""]
        if not all(re.fullmatch(r"[\w.]{1,200}", module) for module in names):
            raise UserError(
                f"{name} in adapter_config.json must map module names to numbers. Regular "
                "expressions are not supported: write the names of the modules.",
                field="file",
                code="invalid_pattern",
            )
        for module in names:
            if name == "rank_pattern":
                check_size(pattern[module], f"{name} of {module[:80]}", MAX_SIZE)
            else:
                check_alpha(pattern[module], f"{name} of {module[:80]}")


def check_size(value: Any, name: str, max_size: int) -> None:
    """Raises UserError: the value is not an integer from 1 to `max_size`."""
    if type(value) is not int or not 1 <= value <= max_size:
        raise UserError(
            f"adapter_config.json sets {name} to {str(value)[:40]}; it must be an integer from "
            f"1 to {max_size:,}.",
            field="file",
            code="invalid_size",
        )


def check_alpha(value: Any, name: str) -> None:
    """Raises UserError: the value is not a number above 0, up to MAX_ALPHA."""
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise UserError(
            f"adapter_config.json sets {name} to {str(value)[:40]}; it must be a number above "
            f"0, up to {MAX_ALPHA:,.0f}.",
            field="file",
            code="invalid_size",
        )


def parse_tensor_name(name: str, method: str) -> tuple[str, str]:
    """Return (module, part). Raises UserError for a tensor that PEFT would not load into such an
    adapter.
    """
    prefix = "" if method in PROMPT_METHODS else TENSOR_PREFIX
    if not name.startswith(prefix):
        raise UserError(
            f"PEFT would ignore tensor {name[:80]!r}, because its name does not start with "
            f"{prefix!r}. Save the adapter with the `save_pretrained` of PEFT's model.",
            field="file",
            code="missing_prefix",
        )
    match = TENSOR_PATTERNS[method].fullmatch(name.removeprefix(prefix))
    if match is None:
        raise UserError(
            f"Tensor {name[:80]!r} does not belong to this type of adapter, which SnapML does not "
            "support. Merge the adapter into its base with PEFT's `merge_and_unload` and register "
            "the result as a model instead.",
            field="file",
            code="unknown_tensor",
        )
    groups = match.groupdict()
    return groups.get("module") or "", groups.get("part") or ""


def has_both_matrices(module: str, shapes: Mapping[str, list[int]]) -> bool:
    pairs = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
    return any(all(f"{TENSOR_PREFIX}{module}.{part}" in shapes for part in pair) for pair in pairs)


def check_tensor_shape(
    name: str, shape: list[int], method: str, expected: tuple[Mapping[str, Any], BaseShapes]
) -> None:
    """Raises UserError for a tensor whose shape fits neither the base's weight nor the config."""
    config, base = expected
    if method in PROMPT_METHODS:
        check_prompt_shape(shape, method, config, base)
        return
    module, part = parse_tensor_name(name, method)
    shapes = list_shapes(module, part, config, base)
    if shape not in shapes:
        raise UserError(
            f"The adapter's {part} for {module[:80]} has shape {shape}, but {base.name} needs "
            f"{' or '.join(map(str, shapes))}. Choose the base model it was trained on, and check "
            "the sizes in adapter_config.json.",
            field="base",
            code="wrong_shape",
        )


def list_shapes(
    module: str, part: str, config: Mapping[str, Any], base: BaseShapes
) -> list[list[int]]:
    """The shapes that a part of an adapter may have for a module of the base."""
    inputs, outputs = base.get_features(module)
    rank, width = get_rank(module, config), config.get("bottleneck_size")
    entries, dimension = base.get_weight_shape(module)
    shapes = {
        "lora_A.weight": [[rank, inputs]],
        "lora_B.weight": [[outputs, rank]],
        "lora_embedding_A": [[rank, entries]],
        "lora_embedding_B": [[dimension, rank]],
        "lora_magnitude_vector": [[outputs], [inputs]],  # the inputs of embeddings
        "ia3_l": [[outputs, 1], [1, inputs]],  # a row for a feedforward module
        "bottleneck_down.weight": [[width, outputs]],
        "bottleneck_down.bias": [[width]],
        "bottleneck_up.weight": [[outputs, width]],
        "bottleneck_up.bias": [[outputs]],
    }
    return shapes[part]


def check_prompt_shape(
    shape: list[int], method: str, config: Mapping[str, Any], base: BaseShapes
) -> None:
    """Raises UserError: a prompt or prefix does not have the sizes that its config says and that
    the base needs.
    """
    tokens, sizes = config.get("num_virtual_tokens"), base.get_prompt_sizes(method)
    if not shape or shape[0] != tokens:
        raise UserError(
            f"The adapter has {shape[0] if shape else 0} virtual tokens, but its config says "
            f"{tokens}.",
            field="file",
            code="wrong_shape",
        )
    used = {name: config.get(name) or size for name, size in sizes.items()}
    width = used.get("token_dim", 0) * (2 * used.get("num_layers", 0) if method == "prefix" else 1)
    if used != sizes or (width and shape[1:] != [width]):
        needed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"The adapter's {method} has shape {shape}, which does not fit {base.name} ({needed}) "
            "or adapter_config.json. Choose the base model it was trained on.",
            field="base",
            code="wrong_shape",
        )
