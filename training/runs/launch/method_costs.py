"""What every technique would take of memory for one model and data, and the laws that are missing
for that, made one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from training.catalog.models import BaseModel, ModelState
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.methods.base import Method
from training.errors import ConfigError, UserError
from training.runs.forecast.memory import forecast_for_device, forecast_memory, get_fixed_overhead
from training.runs.forecast.memory_estimators import (
    CannotEstimate,
    get_cached_estimator,
    get_estimator,
    get_estimator_path,
)
from training.runs.forecast.summary import describe_fit
from training.runs.forecast.target_device import TargetDevice, get_target_device
from training.runs.forecast.token_lengths import TokenLengths, get_cached_lengths
from training.runs.launch.form import switch_method
from training.runs.models import Run
from training.runs.states import UNFINISHED

log = logging.getLogger("snapml.forecast")
# With 8-bit states a law holds for one rank alone (memory_estimator.size_setting); with others, all
# these have the same one.
PRECOMPUTED_RANKS = (16, 8, 32, 64)
# Laws that this worker asked for: one that broke off is tried again only when a person asks
attempted_paths: set[Path] = set()
# models (id, last change, kind of device) of which every law was asked for: looking takes 30 ms
completed_models: set[tuple[int, datetime, str]] = set()


@dataclass(frozen=True)
class MethodCost:
    """A technique's forecast as `describe_fit` tells it; `problem` says why there can be none."""

    method: Method
    memory: dict[str, Any] | None = None
    problem: str = ""
    is_pending: bool = False  # to be simulated

    @property
    def is_impossible(self) -> bool:
        """It cannot be started on this device, whatever else runs there."""
        return bool(self.problem) or (
            self.memory is not None and self.memory["peak"] > self.memory["total"]
        )


def iter_method_configs(values: Mapping[str, Any]) -> Iterator[tuple[str, RunConfig | None]]:
    """The settings as each technique would have them; None where they contradict each other."""
    first_values = {
        name: value[0] if isinstance(value, list) else value for name, value in values.items()
    }
    for name, method in METHODS.items():
        applicable = set(RunConfig.from_dict({"method": name}).to_dict()) - set(
            method.incompatible_settings
        )
        try:
            yield (
                name,
                RunConfig.from_dict(
                    {
                        k: v
                        for k, v in switch_method({**first_values, "method": name}).items()
                        if k in applicable
                    }
                ),
            )
        except ConfigError:
            yield name, None


def compute_method_costs(
    model: BaseModel | None,
    lengths: TokenLengths | None,
    values: Mapping[str, Any],
    target: TargetDevice,
) -> dict[str, MethodCost]:
    """Each technique's cost with these settings, as far as its law has been made."""
    if model is None:
        return {name: MethodCost(method) for name, method in METHODS.items()}
    costs, overhead = {}, get_fixed_overhead(target)
    for name, config in iter_method_configs(values):
        costs[name] = MethodCost(METHODS[name])
        if config is None:
            continue
        try:
            estimator = get_cached_estimator(model.folder, config, target.kind)
        except CannotEstimate as error:
            costs[name] = MethodCost(METHODS[name], problem=error.message)
            continue
        if estimator is None:
            costs[name] = MethodCost(METHODS[name], is_pending=True)
        else:
            memory = forecast_memory(estimator, config, lengths, overhead)
            costs[name] = MethodCost(METHODS[name], memory | describe_fit(memory, target))
    return costs


def simulate_next_missing(model: BaseModel, values: Mapping[str, Any], kind: str) -> None:
    """Simulate the first technique whose law is missing.

    Raises:
        UserError: the simulation broke off.
    """
    for config in iter_missing_configs(model, values, kind):
        try:
            get_estimator(model.folder, config, kind)
        except CannotEstimate:
            pass  # kept as this law's answer, and shown with the technique
        return


def iter_missing_configs(
    model: BaseModel, values: Mapping[str, Any], kind: str
) -> Iterator[RunConfig]:
    """The settings of the techniques whose law for this kind of device has not been made."""
    for _, config in iter_method_configs(values):
        if config is not None and not get_estimator_path(model.folder, config, kind).is_file():
            yield config


def forecast_open_runs() -> None:
    """Runs that were started before their step was simulated (by API or file, mostly) get their
    forecast while they train.
    """
    for run in Run.objects.filter(state__in=UNFINISHED, forecast={}).select_related(
        "base_model", "data", "pool"
    ):
        config, target = RunConfig.from_dict(run.config), get_target_device(run.pool)
        path = get_estimator_path(run.base_model.folder, config, target.kind)
        if path in attempted_paths and not path.is_file():
            continue
        attempted_paths.add(path)
        try:
            lengths = get_cached_lengths(
                run.data, run.base_model, train_on_prompt=config.train_on_prompt
            )
            forecast = forecast_for_device(
                target, get_estimator(run.base_model.folder, config, target.kind), config, lengths
            )
        except UserError as error:
            log.warning("Run %s has no forecast: %s", run.pk, error.message)
            continue
        Run.objects.filter(pk=run.pk, pool=run.pool_id, config=run.config, forecast={}).update(
            forecast=forecast
        )


def precompute_estimator() -> None:
    """One law that is missing for a model that is ready, with usual settings: the launch page then
    waits for none.
    """
    kind = get_target_device().kind
    for model in BaseModel.objects.filter(state=ModelState.READY):
        key = (model.pk, model.updated_at, kind)
        if key in completed_models:
            continue
        for config in chain.from_iterable(
            iter_missing_configs(model, {"rank": rank}, kind) for rank in PRECOMPUTED_RANKS
        ):
            path = get_estimator_path(model.folder, config, kind)
            if path in attempted_paths:
                continue
            attempted_paths.add(path)
            try:
                get_estimator(model.folder, config, kind)
            except UserError as error:
                log.warning("%s on %s: %s", METHODS[config.method].title, model.name, error.message)
            return
        completed_models.add(key)
