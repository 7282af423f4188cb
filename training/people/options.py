"""Options of a select that may have thousands: the first ones, the current one, and a search field
for the others (`_options.html`, `_option_search.html`). Each app registers its sources in
`AppConfig.ready`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from training.errors import NotFound
from training.people.models import User
from training.people.requests import parse_int_or_zero

MAX_OPTIONS = 100
MAX_SEARCH_LENGTH = 100


@dataclass(frozen=True)
class Option:
    value: str
    label: str
    unavailable_reason: str = ""  # empty: it can be chosen


@dataclass(frozen=True)
class OptionSource:
    """`find_rows` returns the rows that a user may choose and that match a text, in order. Without
    `has_ids` the rows are texts, and each is its own value and label.
    """

    name: str
    find_rows: Callable[[User, str], Any]
    to_option: Callable[[Any], Option] = lambda text: Option(text, text)
    has_ids: bool = True

    def find_option(self, user: User, value: str) -> Option | None:
        if not self.has_ids:
            return self.to_option(value) if value else None
        row = self.find_rows(user, "").filter(pk=parse_int_or_zero(value)).first()
        return self.to_option(row) if row is not None else None


@dataclass(frozen=True)
class Options:
    """What a select shows. `has_more` is true if the source has options that are not in `rows`."""

    source: str
    rows: list[Option]
    current: str
    has_more: bool

    def select(self, value: str) -> Options:
        return replace(self, current=value)


SOURCES: dict[str, OptionSource] = {}


def register_source(source: OptionSource) -> None:
    SOURCES[source.name] = source


def get_source(name: str) -> OptionSource:
    if name not in SOURCES:
        raise NotFound("There are no such options.")
    return SOURCES[name]


def list_options(user: User, source: OptionSource, current: Any = "", text: str = "") -> Options:
    """The first MAX_OPTIONS that match the text, and the current one."""
    value = "" if current is None else str(current)
    found = [source.to_option(row) for row in source.find_rows(user, text)[: MAX_OPTIONS + 1]]
    rows = found[:MAX_OPTIONS]
    if value and all(option.value != value for option in rows):
        option = source.find_option(user, value)
        rows += [option] if option is not None else []
    return Options(source.name, rows, value, has_more=len(found) > MAX_OPTIONS)
