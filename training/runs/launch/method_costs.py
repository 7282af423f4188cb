"""The memory forecast of each method for one model and dataset, and the background jobs that fit
missing memory estimators one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
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
from training.runs.forecast.token_lengths import TokenLengths, get_run_lengths
from training.runs.launch.settings_form import switch_method
from training.runs.models import Run
from training.runs.states import UNFINISHED

log = logging.getLogger("snapml.forecast")
# With an 8-bit optimizer, an estimator is valid for one rank only (see get_scaling_setting); with
# any other optimizer these ranks share one.
PRECOMPUTED_RANKS = (16, 8, 32, 64)
# Estimators that this worker has requested. A failed one is only retried on a user's request.
attempted_paths: set[Path] = set()
# Models (id, last change, device kind) with no estimator left to request. A check takes 30 ms.
completed_models: set[tuple[int, datetime, str]] = set()


@dataclass(frozen=True)
class MethodCost:
    """The memory forecast of a method, or the `problem` why there is none."""

    method: Method
    memory: dict[str, Any] | None = None  # of `forecast_memory` and `describe_fit`
    problem: str = ""
    is_pending: bool = False  # not simulated yet

    @property
    def is_unavailable(self) -> bool:
        """The method cannot be used now: it has a problem or does not fit into the free memory."""
        return bool(self.problem) or (self.memory is not None and not self.memory["fits"])

    @property
    def is_impossible(self) -> bool:
        """The method does not fit this device even when it is free."""
        return bool(self.problem) or (
            self.memory is not None and self.memory["peak"] > self.memory["total"]
        )


def iter_method_configs(values: Mapping[str, Any]) -> Iterator[tuple[str, RunConfig | None]]:
    """The config of each method with these settings, or None if they contradict each other."""
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
    """The cost of each method with these settings, as far as its estimator is cached."""
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
    """Fit the estimator of the first method that has none.

    Raises:
        UserError: the simulation failed.
    """
    for config in iter_missing_configs(model, values, kind):
        try:
            get_estimator(model.folder, config, kind)
        except CannotEstimate:
            pass  # cached as the estimator's result, and shown with the method
        return


def iter_missing_configs(
    model: BaseModel, values: Mapping[str, Any], kind: str
) -> Iterator[RunConfig]:
    """The configs of the methods that have no estimator for this kind of device."""
    for _, config in iter_method_configs(values):
        if config is not None and not get_estimator_path(model.folder, config, kind).is_file():
            yield config


def compute_missing_forecasts() -> None:
    """Add the memory forecast to unfinished runs that were launched without one, e.g. by the
    API.
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
            lengths = get_run_lengths(run.data, run.base_model, config)
            forecast = forecast_for_device(
                target, get_estimator(run.base_model.folder, config, target.kind), config, lengths
            )
        except UserError as error:
            log.warning("Run %s has no forecast: %s", run.pk, error.message)
            if error.status == HTTPStatus.TOO_MANY_REQUESTS:  # try again in the next pass
                attempted_paths.discard(path)
            continue
        Run.objects.filter(pk=run.pk, pool=run.pool_id, config=run.config, forecast={}).update(
            forecast=forecast
        )


def precompute_estimator() -> None:
    """Fit one missing estimator with default settings for a ready model, so that the launch page
    does not have to wait for it.
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
