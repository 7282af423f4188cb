"""Auto on the launch page: read the locked settings of the form, and show the plan as one row per
setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.http import QueryDict

from training.auto.plan_types import Choice, Plan
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.runs.launch import settings_form
from training.runs.launch.auto import AutoRequest, PlanPending, compute_plan_digest, make_run_plan
from training.runs.launch.selection import Selection

VALUE_PREFIX = "set-"  # a row's field
PREVIOUS_PREFIX = "was-"  # the value that the page was rendered with
LOCK_FIELD = "lock"  # the checkboxes of locked rows


@dataclass(frozen=True)
class PlanRow:
    choice: Choice
    title: str
    field: settings_form.Field | None  # None for the method

    @property
    def text(self) -> str:
        return format_value(self.choice.value)

    @property
    def css_class(self) -> str:
        return "locked" if self.choice.locked else ""

    @property
    def options(self) -> list[tuple[str, str]]:
        """(value, label) pairs of a select; empty for a text field."""
        if self.field is None:
            return [(name, method.title) for name, method in METHODS.items()]
        if self.field.kind == "bool":
            return [("on", "on"), ("off", "off")]
        return [(choice, choice) for choice in self.field.choices]


@dataclass(frozen=True)
class AutoPlanState:
    """A plan, or the reason why there is none: a problem, or a pending step (`choice` of model or
    data, or one of `PlanPending`).
    """

    request: AutoRequest
    plan: Plan | None = None
    pending_step: str = ""
    problem: UserError | None = None

    @property
    def goal(self) -> str:
        return self.request.goal

    @property
    def rows(self) -> list[PlanRow]:
        if self.plan is None:
            return []
        fields_by_name = settings_form.build_fields(self.plan.settings)
        rows = [
            PlanRow(
                choice,
                settings_form.format_title(choice.setting),
                fields_by_name.get(choice.setting),
            )
            for choice in self.plan.choices
        ]
        return [row for row in rows if row.field or row.choice.setting == "method"]

    @property
    def locked_texts(self) -> list[tuple[str, str]]:
        """The locks as form texts. Hidden fields keep them while there are no rows."""
        return [(name, format_value(value)) for name, value in self.request.locked.items()]

    @property
    def digest(self) -> str:
        """The digest that the form sends to name the plan that the user reviewed."""
        return compute_plan_digest(self.plan) if self.plan else ""


def format_value(value: Any) -> str:
    """A value as the text of its form field."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def parse_locks(form_data: Any) -> dict[str, Any]:
    """The locked settings: rows with a ticked box, and rows whose value was changed."""
    ticked, kinds = (
        set(form_data.getlist(LOCK_FIELD)),
        {name: field.kind for name, field in get_all_fields().items()},
    )
    locked: dict[str, Any] = {}
    for key, text in form_data.items():
        name = key.removeprefix(VALUE_PREFIX)
        if name == key or (
            name not in ticked and text == form_data.get(PREVIOUS_PREFIX + name, text)
        ):
            continue
        locked[name] = (
            text == "on"
            if kinds.get(name) == "bool"
            else settings_form.parse_value(text.strip(), kinds.get(name, "str"))
        )
    return locked


def get_all_fields() -> dict[str, settings_form.Field]:
    """The fields of all methods' settings."""
    return {
        name: field
        for method in METHODS
        for name, field in settings_form.build_fields({"method": method}).items()
    }


def build_plan_state(form_data: Any, selection: Selection, *, wait: bool = False) -> AutoPlanState:
    request = AutoRequest(form_data.get("goal") or AutoRequest().goal, parse_locks(form_data))
    if selection.model is None or selection.version is None:
        return AutoPlanState(request, pending_step="choice")
    try:
        plan = make_run_plan(
            selection.model, selection.version, request, selection.target, wait=wait
        )
    except PlanPending as pending:
        return AutoPlanState(request, pending_step=pending.step)
    except UserError as problem:
        return AutoPlanState(request, problem=problem)
    return AutoPlanState(request, plan)


def get_plan_settings(plan: Plan | None) -> dict[str, Any]:
    """The form values of a plan. Settings that it does not choose keep their defaults."""
    return dict(plan.settings) if plan else {"method": RunConfig().method}


def build_form_data(request: AutoRequest) -> QueryDict:
    """The form data of a goal and its locks; the inverse of `parse_locks`."""
    fields = QueryDict(mutable=True)
    fields["goal"] = request.goal
    fields.setlist(LOCK_FIELD, list(request.locked))
    fields.update(
        {f"{VALUE_PREFIX}{name}": format_value(value) for name, value in request.locked.items()}
    )
    return fields
