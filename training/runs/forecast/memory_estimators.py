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

from training.catalog.card import read_json
from training.child_process import RequestChild
from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.memory_estimator import MemoryEstimator, get_scaling_setting
from training.engine.methods import METHODS
from training.errors import UserError

# Of the laws: one more when the engine's steps change, so that none of the old are read
EDITION = 7
PATIENCE_SECONDS = 120
COMMON = ("method", "precision", "optim", "gradient_checkpointing", "packing")
# Settings of techniques that change nothing in a step's memory.
WEIGHTLESS = {
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


class Unlawful(UserError):
    """The model, or these settings with it, cannot be simulated; the message says why."""


def key_of(folder: Path, config: RunConfig, device: str) -> str:
    """What the law depends on, as one word."""
    config = config.memory_upper_bound()
    names = set(COMMON) | set(METHODS[config.method].settings) - WEIGHTLESS - {
        get_scaling_setting(config, device)
    }
    text = read_json(folder / "config.json")
    window = text.get("sliding_window") or (text.get("text_config") or {}).get("sliding_window")
    told = {name: getattr(config, name) for name in sorted(names)} | {
        "optim": config.resolve_optimizer(device)
    }
    # How much is dropped moves no byte
    told |= {"dropout": config.dropout > 0} if "dropout" in told else {}
    told |= {
        "accumulates": config.accumulates_gradients,
        "beyond": isinstance(window, int) and config.max_length > window,
    }
    whole = json.dumps([EDITION, device, told, text], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def place_of(folder: Path, config: RunConfig, device: str) -> Path:
    return Path(settings.HOME) / "laws" / f"{key_of(folder, config, device)}.json"


def law_of(config_json: dict[str, Any], config: RunConfig, device: str) -> MemoryEstimator:
    """The law of any model from its config.json, made anew (5 to 20 s) and not kept.

    Raises:
        Unlawful: see `kept_law`.
        UserError: the program broke off.
    """
    with tempfile.TemporaryDirectory(prefix="snapml-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json))
        return law_told(
            ANY_MODEL.ask(
                {"model": folder, "settings": config.memory_upper_bound().to_dict(), "device": device}
            )
        )


def law_told(told: dict[str, Any]) -> MemoryEstimator:
    if "error" in told:
        raise Unlawful(told["error"], field=told["field"])
    return MemoryEstimator.from_json(told)


def kept_law(folder: Path, config: RunConfig, device: str) -> MemoryEstimator | None:
    """The law, if it has been made.

    Raises:
        Unlawful: it was tried and there is none.
    """
    path = place_of(folder, config, device)
    if not path.is_file():
        return None
    return law_told(json.loads(path.read_text()))


def law(folder: Path, config: RunConfig, device: str) -> MemoryEstimator:
    """The law, made now if need be: about 6 s, and 5 s more when the program has to be started.

    Raises:
        Unlawful: see `kept_law`.
        UserError: the program broke off, or could not read the model's file just now; the next call
            tries again.
    """
    kept = kept_law(folder, config, device)
    if kept is None:
        told = PROGRAM.ask(
            {"model": str(folder), "settings": config.memory_upper_bound().to_dict(), "device": device}
        )
        if told.get("is_transient"):
            raise UserError(told["error"], field=told["field"])
        path = place_of(folder, config, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(told))
        kept = kept_law(folder, config, device)
        assert kept is not None
    return kept


class Busy(UserError):
    """Too many ask for simulations at this moment."""

    status = 429


class Program(RequestChild):
    """The forecasting program."""

    def __init__(self) -> None:
        super().__init__(
            "training.engine.simulation.forecast",
            max_seconds=PATIENCE_SECONDS,
            environment={"CUDA_VISIBLE_DEVICES": ""},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError: it did not answer in PATIENCE_SECONDS, or broke off; Busy: others ask
        and do not come to an end.
        """
        try:
            answer = self.request(request, cwd=settings.BASE_DIR)
        except TimeoutError as error:
            raise Busy("Others are simulating steps just now; try again in a minute.") from error
        if answer is None:
            raise UserError("The memory forecast broke off; the log of the web server says why.")
        return answer


PROGRAM = Program()  # for models that are here
ANY_MODEL = Program()  # for any config.json, so that nobody's launch page waits for it
