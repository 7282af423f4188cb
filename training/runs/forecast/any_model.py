"""Forecast the memory of a run on any model from its config.json, for the API and
`manage.py forecast`. Nothing is stored.
"""

from __future__ import annotations

import json
import re
from typing import Any

from training.catalog.metadata import check_no_code
from training.engine.config import RunConfig
from training.errors import TooLarge, UserError
from training.runs.forecast.memory import (
    CONTEXT_BYTES,
    FRAMEWORK_BYTES,
    FixedOverhead,
    forecast_memory,
)
from training.runs.forecast.memory_estimators import estimate_from_config

# Llama's config.json has 700 characters; the largest known one, with RoPE tables, has 20,000.
MAX_CONFIG_CHARACTERS = 64_000
COUNT_NAMES = re.compile("layer|head|expert|block|stage")
MAX_COUNT = 4_096  # of a setting whose name matches COUNT_NAMES
MAX_NUMBER = 100_000_000  # of any other setting
REQUIRED_KEYS = ("architectures", "model_type")


def check_config(value: Any, name: str = "") -> None:
    """Check that no number in a config.json is implausibly large. transformers allocates lists by
    the number of layers, heads and experts before the simulation can reduce the depth.

    Raises:
        UserError: a number is larger than that of any real model.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_config(inner, key)
    elif isinstance(value, list):
        for inner in value:
            check_config(inner, name)
    elif isinstance(value, int) and value > (MAX_COUNT if COUNT_NAMES.search(name) else MAX_NUMBER):
        raise UserError(
            f"{name} is {str(value)[:20]} in the config.json, which is too large for a real model.",
            field="config",
        )


def forecast_any_model(
    config_json: dict[str, Any],
    settings: dict[str, Any],
    *,
    rows: int = 1,
    length: int = 2048,
    device: str = "cuda",
) -> dict[str, Any]:
    """The forecast in bytes, with the keys of `forecast_memory`, for one batch of rows x length
    tokens that are all trained.

    Raises:
        ConfigError: a setting is wrong.
        UserError: the config.json is not of a causal language model, it refers to custom code, or
            the model cannot be simulated.
    """
    if len(json.dumps(config_json)) > MAX_CONFIG_CHARACTERS:
        raise TooLarge(
            f"The config.json has more than {MAX_CONFIG_CHARACTERS:,} characters.", field="config"
        )
    missing = [key for key in REQUIRED_KEYS if not config_json.get(key)]
    if missing:
        raise UserError(
            f"The config.json has no {missing[0]}. Use the complete file.", field="config"
        )
    check_no_code(config_json, "config.json")
    check_config(config_json)
    if isinstance(settings.get("max_tokens_per_batch"), int) or "batch_unit" in settings:
        raise UserError(
            "The batch size is set by rows and length here. Remove max_tokens_per_batch and "
            "batch_unit from the settings.",
            field="settings",
        )
    batch = {"batch_unit": "rows", "per_device_train_batch_size": rows, "max_length": length}
    config = RunConfig.from_dict({**settings, **batch})
    overhead = FixedOverhead(FRAMEWORK_BYTES[device], CONTEXT_BYTES[device])
    return forecast_memory(
        estimate_from_config(config_json, config, device), config, None, overhead
    )
