"""Memory laws, each made once and kept: asked of `training.engine.simulation.forecast`, a program
that stays for the next question.

A law depends on the model's config, the technique and some settings, not on data, lengths or
learning rates, so moving those is answered from the kept law at once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings

from training.catalog.metadata import read_json
from training.child_process import RequestProcess
from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.memory_estimator import MemoryEstimator, get_scaling_setting
from training.engine.methods import METHODS
from training.errors import UserError

# Of the laws: one more when the engine's steps change, so that none of the old are read
CACHE_VERSION = 8
TIMEOUT_SECONDS = 120
COMMON_SETTINGS = ("method", "precision", "optim", "gradient_checkpointing", "packing")
# Settings of techniques that change nothing in a step's memory.
MEMORY_NEUTRAL_SETTINGS = {
    "alpha",
    "init_lora_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "loraplus_lr_ratio",
    "use_rslora",
    "alpha_pattern",
    "tuning_budget_fraction",
    "tuning_budget_minutes",
    "tuning_search_space",
}


class CannotEstimate(UserError):
    """The model, or these settings with it, cannot be simulated; the message says why."""


def compute_cache_key(folder: Path, config: RunConfig, device: str) -> str:
    """What the law depends on, as one word."""
    config = config.memory_upper_bound()
    names = set(COMMON_SETTINGS) | set(
        METHODS[config.method].settings
    ) - MEMORY_NEUTRAL_SETTINGS - {get_scaling_setting(config, device)}
    model_config = read_json(folder / "config.json")
    window = model_config.get("sliding_window") or (model_config.get("text_config") or {}).get(
        "sliding_window"
    )
    key_fields = {name: getattr(config, name) for name in sorted(names)} | {
        "optim": config.resolve_optimizer(device)
    }
    # How much is dropped moves no byte
    key_fields |= {"dropout": config.dropout > 0} if "dropout" in key_fields else {}
    key_fields |= {
        "accumulates": config.accumulates_gradients,
        "beyond": isinstance(window, int) and config.max_length > window,
    }
    key_json = json.dumps([CACHE_VERSION, device, key_fields, model_config], sort_keys=True)
    return hashlib.sha256(key_json.encode()).hexdigest()[:32]


def get_estimator_path(folder: Path, config: RunConfig, device: str) -> Path:
    return (
        Path(settings.HOME)
        / "memory_estimators"
        / f"{compute_cache_key(folder, config, device)}.json"
    )


def estimate_from_config(
    config_json: dict[str, Any], config: RunConfig, device: str
) -> MemoryEstimator:
    """The law of any model from its config.json, made anew (5 to 20 s) and not kept.

    Raises:
        Unlawful: see `get_cached_estimator`.
        UserError: the program broke off.
    """
    with tempfile.TemporaryDirectory(prefix="snapml-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json))
        return parse_estimator(
            ANY_MODEL_PROCESS.request_estimator(
                {
                    "model": folder,
                    "settings": config.memory_upper_bound().to_dict(),
                    "device": device,
                }
            )
        )


def parse_estimator(response: dict[str, Any]) -> MemoryEstimator:
    if "error" in response:
        raise CannotEstimate(response["error"], field=response["field"])
    return MemoryEstimator.from_json(response)


def get_cached_estimator(folder: Path, config: RunConfig, device: str) -> MemoryEstimator | None:
    """The law, if it has been made.

    Raises:
        Unlawful: it was tried and there is none.
    """
    path = get_estimator_path(folder, config, device)
    if not path.is_file():
        return None
    return parse_estimator(json.loads(path.read_text()))


def get_estimator(folder: Path, config: RunConfig, device: str) -> MemoryEstimator:
    """The law, made now if need be: about 6 s, and 5 s more when the program has to be started.

    Raises:
        Unlawful: see `get_cached_estimator`.
        UserError: the program broke off, or could not read the model's file just now; the next call
            tries again.
    """
    estimator = get_cached_estimator(folder, config, device)
    if estimator is None:
        response = ESTIMATOR_PROCESS.request_estimator(
            {
                "model": str(folder),
                "settings": config.memory_upper_bound().to_dict(),
                "device": device,
            }
        )
        if response.get("is_transient"):
            raise UserError(response["error"], field=response["field"])
        path = get_estimator_path(folder, config, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(response))
        estimator = get_cached_estimator(folder, config, device)
        assert estimator is not None
    return estimator


class SimulationBusy(UserError):
    """Too many ask for simulations at this moment."""

    status = 429


class EstimatorProcess(RequestProcess):
    """The forecasting program."""

    def __init__(self) -> None:
        super().__init__(
            "training.engine.simulation.forecast",
            max_seconds=TIMEOUT_SECONDS,
            environment={"CUDA_VISIBLE_DEVICES": ""},
        )

    def request_estimator(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError: it did not answer in TIMEOUT_SECONDS, or broke off; SimulationBusy: others ask
        and do not come to an end.
        """
        try:
            answer = self.send_request(request, cwd=settings.BASE_DIR)
        except TimeoutError as error:
            raise SimulationBusy(
                "Others are simulating steps just now; try again in a minute."
            ) from error
        if answer is None:
            raise UserError("The memory forecast broke off; the log of the web server says why.")
        return answer


ESTIMATOR_PROCESS = EstimatorProcess()  # for models that are here
ANY_MODEL_PROCESS = (
    EstimatorProcess()
)  # for any config.json, so that nobody's launch page waits for it
