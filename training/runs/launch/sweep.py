"""Expand settings with several values into a grid of runs, and check all of them before the
launch.
"""

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
    """A run of a launch: its config, and its values in the grid (empty for a single run)."""

    config: RunConfig
    values: Mapping[str, Any]

    @property
    def label(self) -> str:
        return format_label(self.values)


def format_label(values: Mapping[str, Any]) -> str:
    """`rank 4, learning_rate 0.001`. A method is named by its title."""
    return ", ".join(
        METHODS[value].title if name == "method" and value in METHODS else f"{name} {value}"
        for name, value in values.items()
    )


def split_grid(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The settings with one value, and those with several. Duplicate values count once."""
    grid = {
        name: unique_values(name, values)
        for name, values in settings.items()
        if isinstance(values, list)
    }
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ConfigError(f"{empty[0]} is an empty list. Add a value or remove it.", field=empty[0])
    single = {name: values[0] for name, values in grid.items() if len(values) == 1}
    fixed = {name: value for name, value in settings.items() if name not in grid}
    return fixed | single, {name: values for name, values in grid.items() if len(values) > 1}


def unique_values(name: str, values: list[Any]) -> list[Any]:
    """The distinct values in order. 1 and True are different values here."""
    unique = {(type(value), check_scalar(name, value)): value for value in values}
    return list(unique.values())


def check_scalar(name: str, value: Any) -> Any:
    """Raises ConfigError: the value is not a number, a boolean or a text."""
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{name} is {str(value)[:40]} in one run. It must be a number or a text.", field=name
        )
    return value


def expand_grid(
    settings: Mapping[str, Any], *, skip_impossible: bool = False
) -> tuple[dict[str, list[Any]], list[Member], dict[str, str]]:
    """The grid, its members in order, and the label and reason of each invalid member.

    Raises:
        TooLarge: more than MAX_RUNS runs.
        ConfigError: a member is invalid; with `skip_impossible`, all members are.
    """
    unknown = sorted(set(settings) - SETTING_NAMES)
    if unknown:
        raise ConfigError(f"Unknown setting {unknown[0][:40]!r}.", field=unknown[0][:40])
    fixed, grid = split_grid(settings)
    count = math.prod(len(values) for values in grid.values())
    if count > MAX_RUNS:
        sizes = " x ".join(str(len(values)) for values in grid.values())
        raise TooLarge(
            f"The sweep has {sizes} = {count:,} runs, more than {MAX_RUNS}. Remove some values.",
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
    """The result of `check` for each item that passes, and the label and reason of each that fails.

    Raises:
        UserError: the first failure; with `skip_impossible`, only if all items fail.
    """
    possible: list[Checked] = []
    impossible: dict[str, str] = {}
    first: UserError | None = None
    for item in items:
        try:
            possible.append(check(item))
        except UserError as error:
            if not skip_impossible:
                raise
            impossible[label(item)] = error.message
            first = first or error
    if first is not None and not possible:
        raise first
    return possible, impossible


def compute_warning_id(warning: str) -> str:
    """The id of a warning in the form, so that only warnings that were shown are accepted."""
    return hashlib.sha256(warning.encode()).hexdigest()[:16]
