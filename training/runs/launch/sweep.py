"""Several values for a setting: the grid they span, counted before it is started, and started as
one sweep.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from typing import Any

from django.db import transaction

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.errors import ConfigError, TooLarge, one_line
from training.people.models import User
from training.runs.forecast.summary import all_warnings, refuse_fault
from training.runs.forecast.token_lengths import kept_lengths
from training.runs.launch.services import launch_run, read_settings, team_of
from training.runs.models import MAX_NAME, Sweep
from training.runs.queue.placement import ANYWHERE, Where

MOST_RUNS = 60
KNOWN = {f.name for f in dataclasses.fields(RunConfig)}


def split_grid(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Settings with one value, and those with several. A value that is named twice counts once."""
    grid = {
        name: list(dict.fromkeys(plain(name, value) for value in values))
        for name, values in settings.items()
        if isinstance(values, list)
    }
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ConfigError(
            f"{empty[0]} is an empty list; give it a value, or leave it out.", field=empty[0]
        )
    single = {name: values[0] for name, values in grid.items() if len(values) == 1}
    fixed = {name: value for name, value in settings.items() if name not in grid}
    return fixed | single, {name: values for name, values in grid.items() if len(values) > 1}


def plain(name: str, value: Any) -> Any:
    """Raises ConfigError: a list or an object among the values of a setting."""
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{name} is {str(value)[:40]} in one run; it must be a number or a word.", field=name
        )
    return value


def members(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run of the grid, in its order.

    Raises:
        TooLarge: more than MOST_RUNS runs.
        ConfigError: one of them cannot be right.
    """
    unknown = sorted(set(settings) - KNOWN)
    if unknown:
        raise ConfigError(f"There is no setting {unknown[0][:40]!r}.", field=unknown[0][:40])
    fixed, grid = split_grid(settings)
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_RUNS:
        sizes = " x ".join(str(len(values)) for values in grid.values())
        raise TooLarge(
            f"{sizes} = {count:,} runs; a sweep has at most {MOST_RUNS}. Take values out.",
            field=next(iter(grid)),
        )
    made = [
        fixed | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    for one in made:
        read_settings(one)
    return made


def warnings_of(
    everyone: list[dict[str, Any]], base_model: BaseModel, data: DatasetVersion
) -> list[str]:
    """What the card would warn of for any run of the grid, as far as it is known without waiting;
    each once.
    """
    configs = [read_settings(settings) for settings in everyone]
    lengths = {
        on: kept_lengths(data, base_model, train_on_prompt=on)
        for on in {config.train_on_prompt for config in configs}
    }
    for found in lengths.values():
        refuse_fault(found)
    warnings = [
        all_warnings(config, base_model, lengths[config.train_on_prompt]) for config in configs
    ]
    return list(dict.fromkeys(words for some in warnings for words in some))


def mark(words: str) -> str:
    """A warning's name in a form, so that a person passes just what they have seen."""
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def launch_sweep(
    user: User,
    *,
    base_model: BaseModel,
    data: DatasetVersion,
    settings: dict[str, Any],
    name: str = "",
    where: Where = ANYWHERE,
) -> Sweep:
    """Start a run for every place of the grid; all of them or none.

    Raises:
        TooLarge, ConfigError, Conflict: see `members` and `launch_run`.
    """
    _, grid = split_grid(settings)
    everyone = members(settings)
    title = one_line(name)[:MAX_NAME] or f"{data.dataset.name}, {' x '.join(grid)}"[:MAX_NAME]
    with transaction.atomic():
        sweep = Sweep.objects.create(owner=user, team=team_of(user, data), name=title, grid=grid)
        for one in everyone:
            words = ", ".join(f"{key} {one[key]}" for key in grid)
            asked: dict[str, Any] = {
                "base_model": base_model,
                "data": data,
                "settings": one,
                "name": f"{title}: {words}",
            }
            run = launch_run(user, **asked, where=where)
            run.sweep = sweep
            run.save(update_fields=["sweep"])
    return sweep
