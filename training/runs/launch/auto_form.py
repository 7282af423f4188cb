"""The launch page's Auto: what is locked in the posted form, and the plan as rows with a field
each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.auto.situation import GOALS, Choice, Plan
from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.errors import UserError
from training.runs.forecast import token_lengths
from training.runs.launch import form
from training.runs.launch.auto import Case, NotSimulated, plan_for
from training.runs.launch.selection import Picked

SET, WAS, LOCK = (
    "set-",
    "was-",
    "lock",
)  # a row's field, what stood there when it was shown, the ticked rows


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
            return [(name, method.title) for name, method in TABLE.items()]
        if self.field.kind == "bool":
            return [("on", "on"), ("off", "off")]
        return [(one, one) for one in self.field.choices]


@dataclass(frozen=True)
class Planned:
    """A plan, or why there is none yet: something is to be chosen, counted or simulated first, or
    it is a problem.
    """

    goal: str
    locked: Mapping[str, Any]
    plan: Plan | None = None
    waits_for: str = ""
    problem: UserError | None = None

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
        return [(name, text_of(value)) for name, value in self.locked.items()]

    @property
    def mark(self) -> str:
        """The plan as one word: a launch says which plan was on the screen."""
        return mark_of(self.plan.settings) if self.plan else ""


def text_of(value: Any) -> str:
    """A value as its field has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def mark_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
        name: field for method in TABLE for name, field in form.fields({"method": method}).items()
    }


def planned(posted: Any, picked: Picked, *, wait: bool = False) -> Planned:
    model, version = picked.model, picked.version
    goal = posted.get("goal") or next(iter(GOALS))
    locked = locked_in(posted)
    if model is None or version is None:
        return Planned(goal, locked, waits_for="choice")
    found = token_lengths.kept_lengths(version, model)
    if found is None:
        return Planned(goal, locked, waits_for="lengths")
    try:
        return Planned(
            goal,
            locked,
            plan_for(
                Case(model, version, found, picked.target), goal=goal, locked=locked, wait=wait
            ),
        )
    except NotSimulated:
        return Planned(goal, locked, waits_for="memory")
    except UserError as problem:
        return Planned(goal, locked, problem=problem)


def settings_of(plan: Plan | None) -> dict[str, Any]:
    """The form's values for a plan: everything that it does not choose is as usual."""
    return dict(plan.settings) if plan else {"method": RunConfig().method}
