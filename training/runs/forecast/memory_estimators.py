"""Memory estimators, each fitted once by a child process (`training.engine.simulation.forecast`)
and cached on disk.

An estimator depends on the model's config, the method and some settings, but not on the data, its
lengths or the learning rate. A change of those is answered from the cache.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings

from training.catalog.metadata import read_json
from training.child_process import GIB, ProgramLimits, RequestProcess
from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.memory_estimator import MemoryEstimator, get_scaling_setting
from training.engine.methods import METHODS
from training.errors import UserError
from training.people.current_user import hold_program_slot

# Increase it when the engine's steps or the estimator's JSON change, so that old files are ignored.
CACHE_VERSION = 8
TIMEOUT_SECONDS = 120
# With the libraries of torch; a config.json may ask for any size
LIMITS = ProgramLimits(address_space_bytes=8 * GIB, counted_bytes=2 * GIB)
COMMON_SETTINGS = ("method", "precision", "optim", "gradient_checkpointing", "packing")
# Settings of methods that do not change the memory of a step.
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
    """This model cannot be simulated, at least not with these settings. The message says why."""


def compute_cache_key(folder: Path, config: RunConfig, device: str) -> str:
    """A digest of everything that the estimator depends on."""
    config = config.to_memory_upper_bound()
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
    # The dropout rate does not change memory, but dropout itself does.
    key_fields |= {"dropout": config.dropout > 0} if "dropout" in key_fields else {}
    key_fields |= {
        "accumulates": config.accumulates_gradients,
        "exceeds_window": isinstance(window, int) and config.max_length > window,
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
    """Fit the estimator of any model from its config.json (5 to 20 s). It is not cached.

    Raises:
        CannotEstimate: this configuration cannot be simulated.
        UserError: the child process failed.
    """
    with tempfile.TemporaryDirectory(prefix="snapml-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json))
        return parse_estimator(
            ANY_MODEL_PROCESS.request_estimator(
                {
                    "model": folder,
                    "settings": config.to_memory_upper_bound().to_dict(),
                    "device": device,
                }
            )
        )


def parse_estimator(response: dict[str, Any]) -> MemoryEstimator:
    if "error" in response:
        raise CannotEstimate(response["error"], field=response["field"])
    return MemoryEstimator.from_json(response)


def get_cached_estimator(folder: Path, config: RunConfig, device: str) -> MemoryEstimator | None:
    """The cached estimator, or None.

    Raises:
        CannotEstimate: this configuration was tried before and cannot be simulated.
    """
    path = get_estimator_path(folder, config, device)
    if not path.is_file():
        return None
    return parse_estimator(json.loads(path.read_text()))


def get_estimator(folder: Path, config: RunConfig, device: str) -> MemoryEstimator:
    """The estimator, from the cache or fitted now. Fitting takes about 6 s, and 5 s more if the
    child process has to start.

    Raises:
        CannotEstimate: this configuration cannot be simulated.
        UserError: the child process failed, or could not read the model's files. The next call
            tries again.
    """
    estimator = get_cached_estimator(folder, config, device)
    if estimator is None:
        response = ESTIMATOR_PROCESS.request_estimator(
            {
                "model": str(folder),
                "settings": config.to_memory_upper_bound().to_dict(),
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
    """Too many simulations are requested at the same time."""

    status = 429


class EstimatorProcess(RequestProcess):
    """The child process that fits estimators. It stays alive for the next request; a lock in
    `RequestProcess` serves one thread at a time.
    """

    def __init__(self) -> None:
        super().__init__(
            "training.engine.simulation.forecast",
            max_seconds=TIMEOUT_SECONDS,
            limits=LIMITS,
            environment={"CUDA_VISIBLE_DEVICES": ""},
        )

    def request_estimator(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its response.

        Raises:
            UserError: the process failed or did not respond within TIMEOUT_SECONDS.
            SimulationBusy: other requests kept the process busy for that long.
            SlotsBusy: too many programs run on this host.
        """
        try:
            with hold_program_slot(LIMITS.counted_bytes):
                response = self.send_request(request, cwd=settings.BASE_DIR)
        except TimeoutError as error:
            raise SimulationBusy(
                "Other memory simulations are running. Try again in a minute."
            ) from error
        if response is None:
            raise UserError("The memory forecast failed. See the web server's log.")
        return response


ESTIMATOR_PROCESS = EstimatorProcess()  # for the models of the catalog
# For uploaded config.json files, so that they do not delay the launch page.
ANY_MODEL_PROCESS = EstimatorProcess()
