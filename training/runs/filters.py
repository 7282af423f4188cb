"""The list of runs: filters and order from an allow-list, so that no address can ask the ORM for
anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.core.paginator import Page, Paginator
from django.db.models import F, Q

from training.errors import UserError, one_line
from training.people.models import User
from training.runs.models import Run
from training.runs.states import State

RUNS_A_PAGE = 50
RELATED = ("owner", "base_model", "data__dataset")
HEAVY = ("config", "plan", "notes")
MOST_TEXT = 100
# What a column is sorted by. Nothing else from an address reaches order_by().
SORTS = {
    "state": "state",
    "name": "name",
    "model": "base_model__name",
    "method": "method",
    "data": "data__dataset__name",
    "progress": "step",
    "loss": "loss",
    "heldout": "best_eval_loss",
    "memory": "peak_memory_bytes",
    "owner": "owner__username",
    "started": "created_at",
}
# What can be filtered by: the parameter and the field that it is compared with.
EXACT = {
    "state": "state",
    "model": "base_model__name",
    "owner": "owner__username",
    "method": "method",
    "data": "data__dataset__name",
}


@dataclass(frozen=True)
class Asked:
    """What an address asks of the list. `sort` is a key of SORTS, with `-` for descending."""

    values: dict[str, str]
    text: str = ""
    tag: str = ""
    sort: str = "-started"
    archived: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Asked:
        """Raises UserError: an unknown state or column."""
        values = {
            name: one_line(query.get(name, ""))[:MOST_TEXT] for name in EXACT if query.get(name)
        }
        if values.get("state") not in (None, *State.values):
            raise UserError(f"state must be one of {', '.join(State.values)}.", field="state")
        sort = query.get("sort") or "-started"
        if sort.removeprefix("-") not in SORTS:
            raise UserError(
                f"sort must be one of {', '.join(SORTS)}, with - before it for descending.",
                field="sort",
            )
        text, tag = (one_line(query.get(name, ""))[:MOST_TEXT] for name in ("q", "tag"))
        return cls(values, text, tag, sort, query.get("archived") in ("1", "on", "true", "True"))

    def address(self, **changes: str) -> str:
        """The query string of this list with some parts changed; page numbers are left out."""
        parts = {
            **self.values,
            "q": self.text,
            "tag": self.tag,
            "sort": self.sort,
            "archived": "1" if self.archived else "",
        }
        return urlencode({name: value for name, value in {**parts, **changes}.items() if value})


def find(user: User, asked: Asked) -> Any:
    """The runs that a person may see and asks for, in order. One query, whatever their number."""
    rows = Run.objects.visible_to(user).select_related(*RELATED).defer(*HEAVY)
    rows = rows.filter(archived_at__isnull=not asked.archived)
    rows = rows.filter(**{EXACT[name]: value for name, value in asked.values.items()})
    if asked.text:
        rows = rows.filter(
            Q(name__icontains=asked.text)
            | Q(notes__icontains=asked.text)
            | Q(tags__icontains=asked.text)
        )
    if asked.tag:
        rows = rows.filter(tags__contains=f",{asked.tag},")
    column = F(SORTS[asked.sort.removeprefix("-")])
    order = (
        column.desc(nulls_last=True) if asked.sort.startswith("-") else column.asc(nulls_last=True)
    )
    return rows.order_by(order, "-pk")


def one_page(user: User, asked: Asked, number: str | None) -> Page[Any]:
    return Paginator(find(user, asked), RUNS_A_PAGE).get_page(number)


def options(user: User) -> dict[str, list[str]]:
    """What the filters offer: the values that occur. One query a filter."""
    rows = Run.objects.visible_to(user).order_by()
    found = {
        name: sorted(rows.values_list(field, flat=True).distinct())
        for name, field in EXACT.items()
        if name != "state"
    }
    tagged = rows.exclude(tags="").values_list("tags", flat=True).distinct()
    return {**found, "tag": sorted({tag for tags in tagged for tag in tags.split(",") if tag})}
