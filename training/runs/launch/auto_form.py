"""The launch page's Auto: what is locked in the posted form, and the plan as rows with a field
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.http import QueryDict

from training.auto.situation import Choice, Plan
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.runs.launch import form
from training.runs.launch.auto import AutoRequest, PlanPending, make_run_plan, plan_digest
from training.runs.launch.selection import Picked

# A row's field, what stood there when it was shown, the ticked rows
SET, WAS, LOCK = (
    "set-",
    "was-",
    "lock",
)


@dataclass(frozen=True)
class Row:
    choice: Choice
    title: str
    field: form.Field | None  # of the technique there is none

    @property
    def text(self) -> str:
        return text_of(self.choice.value)

    @property
    def options(self) -> list[tuple[str, str]]:
        """(value, words) of a select; none where a number or a text is typed."""
        if self.field is None:
            return [(name, method.title) for name, method in METHODS.items()]
        if self.field.kind == "bool":
            return [("on", "on"), ("off", "off")]
        return [(one, one) for one in self.field.choices]


@dataclass(frozen=True)
class Planned:
    """A plan, or why there is none yet: something is to be chosen, counted or simulated first, or
    it is a problem.
    """

    request: AutoRequest
    plan: Plan | None = None
    waits_for: str = ""
    problem: UserError | None = None

    @property
    def goal(self) -> str:
        return self.request.goal

    @property
    def rows(self) -> list[Row]:
        if self.plan is None:
            return []
        known = form.fields(self.plan.settings)
        rows = [
            Row(choice, form.title(choice.setting), known.get(choice.setting))
            for choice in self.plan.choices
        ]
        return [row for row in rows if row.field or row.choice.setting == "method"]

    @property
    def locked_texts(self) -> list[tuple[str, str]]:
        """Locks as the form has them, for while there are no rows."""
        return [(name, text_of(value)) for name, value in self.request.locked.items()]

    @property
    def digest(self) -> str:
        """The plan as one word: a launch says which plan was on the screen."""
        return plan_digest(self.plan) if self.plan else ""


def text_of(value: Any) -> str:
    """A value as its field has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def locked_in(posted: Any) -> dict[str, Any]:
    """Rows that are ticked, and those in which something else stands than was shown."""
    ticked, kinds = (
        set(posted.getlist(LOCK)),
        {name: field.kind for name, field in every_field().items()},
    )
    locked: dict[str, Any] = {}
    for key, text in posted.items():
        name = key.removeprefix(SET)
        if name == key or (name not in ticked and text == posted.get(WAS + name, text)):
            continue
        locked[name] = (
            text == "on"
            if kinds.get(name) == "bool"
            else form.typed(text.strip(), kinds.get(name, "str"))
        )
    return locked


def every_field() -> dict[str, form.Field]:
    """The settings of all techniques."""
    return {
        name: field for method in METHODS for name, field in form.fields({"method": method}).items()
    }


def planned(posted: Any, picked: Picked, *, wait: bool = False) -> Planned:
    request = AutoRequest(posted.get("goal") or AutoRequest().goal, locked_in(posted))
    if picked.model is None or picked.version is None:
        return Planned(request, waits_for="choice")
    try:
        plan = make_run_plan(picked.model, picked.version, request, picked.target, wait=wait)
    except PlanPending as pending:
        return Planned(request, waits_for=pending.step)
    except UserError as problem:
        return Planned(request, problem=problem)
    return Planned(request, plan)


def settings_of(plan: Plan | None) -> dict[str, Any]:
    """The form's values for a plan: everything that it does not choose is as usual."""
    return dict(plan.settings) if plan else {"method": RunConfig().method}


def form_of(request: AutoRequest) -> QueryDict:
    """The form's fields for a goal and its locks, as `locked_in` reads them."""
    fields = QueryDict(mutable=True)
    fields["goal"] = request.goal
    fields.setlist(LOCK, list(request.locked))
    fields.update({f"{SET}{name}": text_of(value) for name, value in request.locked.items()})
    return fields
