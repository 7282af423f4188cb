"""Filters and sort order of the list of runs. Both come from an allow-list, so a query string
cannot reach other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.db.models import F, Q

from training.errors import UserError, to_one_line
from training.people.models import User
from training.people.options import Options, list_options
from training.runs.models import Run
from training.runs.option_sources import FILTER_SOURCES
from training.runs.states import State

RUNS_PER_PAGE = 50
RELATED = ("owner", "base_model", "data__dataset")
DEFERRED_FIELDS = ("config", "start_info", "notes")
MAX_TEXT_LENGTH = 100
# The field that each column is sorted by. Nothing else from a query string reaches order_by().
SORT_COLUMNS = {
    "state": "state",
    "name": "name",
    "model": "base_model__name",
    "method": "method",
    "data": "data__dataset__name",
    "progress": "step",
    "loss": "loss",
    "eval_loss": "best_eval_loss",
    "memory": "peak_memory_bytes",
    "owner": "owner__username",
    "started": "created_at",
}
# The parameters for filtering, and the field that each is compared with.
EXACT_FILTERS = {
    "state": "state",
    "model": "base_model__name",
    "owner": "owner__username",
    "method": "method",
    "data": "data__dataset__name",
}


@dataclass(frozen=True)
class RunFilters:
    """The filters of a query string. `sort` is a key of SORT_COLUMNS, with a leading `-` for
    descending order.
    """

    values: dict[str, str]
    text: str = ""
    tag: str = ""
    sort: str = "-started"
    archived: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> RunFilters:
        """Raises UserError: an unknown state or column."""
        values = {
            name: to_one_line(query.get(name, ""))[:MAX_TEXT_LENGTH]
            for name in EXACT_FILTERS
            if query.get(name)
        }
        if values.get("state") not in (None, *State.values):
            raise UserError(f"state must be one of {', '.join(State.values)}.", field="state")
        sort = query.get("sort") or "-started"
        if sort.removeprefix("-") not in SORT_COLUMNS:
            raise UserError(
                f"sort must be one of {', '.join(SORT_COLUMNS)}, with - before it for descending.",
                field="sort",
            )
        text, tag = (to_one_line(query.get(name, ""))[:MAX_TEXT_LENGTH] for name in ("q", "tag"))
        return cls(values, text, tag, sort, query.get("archived") in ("1", "on", "true", "True"))

    def build_query_string(self, **changes: str) -> str:
        """The query string of this list with some parameters changed, without the page number."""
        parts = {
            **self.values,
            "q": self.text,
            "tag": self.tag,
            "sort": self.sort,
            "archived": "1" if self.archived else "",
        }
        return urlencode({name: value for name, value in {**parts, **changes}.items() if value})


def filter_runs(user: User, run_filters: RunFilters) -> Any:
    """The matching runs that the user may see, sorted. One query for any number of runs."""
    rows = Run.objects.visible_to(user).select_related(*RELATED).defer(*DEFERRED_FIELDS)
    rows = rows.filter(archived_at__isnull=not run_filters.archived)
    rows = rows.filter(**{EXACT_FILTERS[name]: value for name, value in run_filters.values.items()})
    if run_filters.text:
        rows = rows.filter(
            Q(name__icontains=run_filters.text)
            | Q(notes__icontains=run_filters.text)
            | Q(tags__icontains=run_filters.text)
        )
    if run_filters.tag:
        rows = rows.filter(tags__contains=f",{run_filters.tag},")
    column = F(SORT_COLUMNS[run_filters.sort.removeprefix("-")])
    order = (
        column.desc(nulls_last=True)
        if run_filters.sort.startswith("-")
        else column.asc(nulls_last=True)
    )
    return rows.order_by(order, "-pk")


def list_filter_options(user: User, run_filters: RunFilters) -> dict[str, Options]:
    """The values that occur in each filter's field. One query per filter."""
    current = {**run_filters.values, "tag": run_filters.tag}
    return {
        name: list_options(user, source, current.get(name))
        for name, source in FILTER_SOURCES.items()
    }
