"""Several values for a setting span a grid of runs, counted and checked before any is started."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import ConfigError, TooLarge, UserError
from training.runs.launch.services import read_settings

MAX_RUNS = 60
Item = TypeVar("Item")
Checked = TypeVar("Checked")
SETTING_NAMES = {f.name for f in dataclasses.fields(RunConfig)}


@dataclass(frozen=True)
class Member:
    """A run of a launch: its settings, and its place in the grid (empty where it is the only
    one).
    """

    config: RunConfig
    values: Mapping[str, Any]

    @property
    def label(self) -> str:
        return format_label(self.values)


def format_label(values: Mapping[str, Any]) -> str:
    """`rank 4, learning_rate 0.001`; a technique is called by its title."""
    return ", ".join(
        METHODS[value].title if name == "method" and value in METHODS else f"{name} {value}"
        for name, value in values.items()
    )


def split_grid(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Settings with one value, and those with several. A value that is named twice counts once."""
    grid = {
        name: unique_values(name, values)
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


def unique_values(name: str, values: list[Any]) -> list[Any]:
    """In order; 1 and True are two values, though Python calls them equal."""
    unique = {(type(value), check_scalar(name, value)): value for value in values}
    return list(unique.values())


def check_scalar(name: str, value: Any) -> Any:
    """Raises ConfigError: a list or an object among the values of a setting."""
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{name} is {str(value)[:40]} in one run; it must be a number or a word.", field=name
        )
    return value


def expand_grid(
    settings: Mapping[str, Any], *, skip_impossible: bool = False
) -> tuple[dict[str, list[Any]], list[Member], dict[str, str]]:
    """The grid, its runs in order, and the label and reason of each that cannot be.

    Raises:
        TooLarge: more than MAX_RUNS runs.
        ConfigError: one of them cannot be right; with `skip_impossible`, none of them can.
    """
    unknown = sorted(set(settings) - SETTING_NAMES)
    if unknown:
        raise ConfigError(f"There is no setting {unknown[0][:40]!r}.", field=unknown[0][:40])
    fixed, grid = split_grid(settings)
    count = math.prod(len(values) for values in grid.values())
    if count > MAX_RUNS:
        sizes = " x ".join(str(len(values)) for values in grid.values())
        raise TooLarge(
            f"{sizes} = {count:,} runs; a sweep has at most {MAX_RUNS}. Take values out.",
            field=next(iter(grid)),
        )
    combinations = [
        dict(zip(grid, combination, strict=True))
        for combination in itertools.product(*grid.values())
    ]
    members, impossible = collect_possible(
        combinations,
        lambda values: Member(read_settings(fixed | values), values),
        format_label,
        skip_impossible=skip_impossible,
    )
    return grid, members, impossible


def collect_possible(
    items: Iterable[Item],
    check: Callable[[Item], Checked],
    label: Callable[[Item], str],
    *,
    skip_impossible: bool,
) -> tuple[list[Checked], dict[str, str]]:
    """What `check` makes of each, and the label and reason of each that it refuses.

    Raises:
        UserError: the first that is refused; with `skip_impossible`, only where all are.
    """
    possible: list[Checked] = []
    refused: dict[str, str] = {}
    first: UserError | None = None
    for item in items:
        try:
            possible.append(check(item))
        except UserError as error:
            if not skip_impossible:
                raise
            refused[label(item)] = error.message
            first = first or error
    if first is not None and not possible:
        raise first
    return possible, refused


def compute_warning_id(warning: str) -> str:
    """A warning's name in a form, so that a person accepts just what they have seen."""
    return hashlib.sha256(warning.encode()).hexdigest()[:16]
