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
from training.runs.forecast.memory import constant_part, forecast_on, memory_forecast
from training.runs.forecast.memory_estimators import Unlawful, kept_law, law, place_of
from training.runs.forecast.summary import fit_words
from training.runs.forecast.target_device import Target, target_of
from training.runs.forecast.token_lengths import Lengths, kept_lengths
from training.runs.launch.form import follow_method
from training.runs.models import Run
from training.runs.states import OPEN

log = logging.getLogger("snapml.forecast")
# With 8-bit states a law holds for one rank alone (memory_estimator.size_setting); with others, all
# these have the same one.
RANKS = (16, 8, 32, 64)
# Laws that this worker asked for: one that broke off is tried again only when a person asks
tried: set[Path] = set()
# models (id, last change, kind of device) of which every law was asked for: looking takes 30 ms
complete: set[tuple[int, datetime, str]] = set()


@dataclass(frozen=True)
class Cost:
    """A technique's forecast as `fit_words` tells it; `problem` says why there can be none."""

    method: Method
    memory: dict[str, Any] | None = None
    problem: str = ""
    waits: bool = False  # to be simulated

    @property
    def impossible(self) -> bool:
        """It cannot be started on this device, whatever else runs there."""
        return bool(self.problem) or (
            self.memory is not None and self.memory["peak"] > self.memory["total"]
        )


def configs_of(values: Mapping[str, Any]) -> Iterator[tuple[str, RunConfig | None]]:
    """The settings as each technique would have them; None where they contradict each other."""
    first = {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
    for name, method in METHODS.items():
        known = set(RunConfig.from_dict({"method": name}).to_dict()) - set(method.incompatible_settings)
        try:
            yield (
                name,
                RunConfig.from_dict(
                    {
                        k: v
                        for k, v in follow_method({**first, "method": name}).items()
                        if k in known
                    }
                ),
            )
        except ConfigError:
            yield name, None


def costs(
    model: BaseModel | None, found: Lengths | None, values: Mapping[str, Any], target: Target
) -> dict[str, Cost]:
    """Each technique's cost with these settings, as far as its law has been made."""
    if model is None:
        return {name: Cost(method) for name, method in METHODS.items()}
    made, constant = {}, constant_part(target)
    for name, config in configs_of(values):
        made[name] = Cost(METHODS[name])
        if config is None:
            continue
        try:
            kept = kept_law(model.folder, config, target.kind)
        except Unlawful as error:
            made[name] = Cost(METHODS[name], problem=error.message)
            continue
        if kept is None:
            made[name] = Cost(METHODS[name], waits=True)
        else:
            memory = memory_forecast(kept, config, found, constant)
            made[name] = Cost(METHODS[name], memory | fit_words(memory, target))
    return made


def make_one_missing(model: BaseModel, values: Mapping[str, Any], kind: str) -> None:
    """Simulate the first technique whose law is missing.

    Raises:
        UserError: the simulation broke off.
    """
    for config in missing(model, values, kind):
        try:
            law(model.folder, config, kind)
        except Unlawful:
            pass  # kept as this law's answer, and shown with the technique
        return


def missing(model: BaseModel, values: Mapping[str, Any], kind: str) -> Iterator[RunConfig]:
    """The settings of the techniques whose law for this kind of device has not been made."""
    for _, config in configs_of(values):
        if config is not None and not place_of(model.folder, config, kind).is_file():
            yield config


def forecast_launched() -> None:
    """Runs that were started before their step was simulated (by API or file, mostly) get their
    forecast while they train.
    """
    for run in Run.objects.filter(state__in=OPEN, forecast={}).select_related(
        "base_model", "data", "pool"
    ):
        config, target = RunConfig.from_dict(run.config), target_of(run.pool)
        place = place_of(run.base_model.folder, config, target.kind)
        if place in tried and not place.is_file():
            continue
        tried.add(place)
        try:
            found = kept_lengths(run.data, run.base_model, train_on_prompt=config.train_on_prompt)
            made = forecast_on(
                target, law(run.base_model.folder, config, target.kind), config, found
            )
        except UserError as error:
            log.warning("Run %s has no forecast: %s", run.pk, error.message)
            continue
        Run.objects.filter(pk=run.pk, pool=run.pool_id, config=run.config, forecast={}).update(
            forecast=made
        )


def make_beforehand() -> None:
    """One law that is missing for a model that is ready, with usual settings: the launch page then
    waits for none.
    """
    kind = target_of().kind
    for model in BaseModel.objects.filter(state=ModelState.READY):
        key = (model.pk, model.updated_at, kind)
        if key in complete:
            continue
        for config in chain.from_iterable(missing(model, {"rank": rank}, kind) for rank in RANKS):
            place = place_of(model.folder, config, kind)
            if place in tried:
                continue
            tried.add(place)
            try:
                law(model.folder, config, kind)
            except UserError as error:
                log.warning("%s on %s: %s", METHODS[config.method].title, model.name, error.message)
            return
        complete.add(key)
