"""Read the launch form: the selection (model, data, pool ...) and the settings, either typed or
from a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.people.requests import AuthenticatedRequest
from training.runs.launch import auto_form, settings_form
from training.runs.launch.request import LaunchRequest
from training.runs.launch.selection import FORM_FIELDS, Selection


@dataclass(frozen=True)
class LaunchInput:
    """The content of the launch form. `values` are the plan's settings with Auto, else the typed
    ones.
    """

    selection: Selection
    values: dict[str, Any]
    is_auto: bool
    plan_state: auto_form.AutoPlanState | None = None
    plan_digest: str | None = None  # of the plan that the user reviewed

    def to_launch_request(self) -> LaunchRequest:
        """Raises NotFound: the model, data, pool or adapter version does not exist."""
        plan_state = self.plan_state if self.is_auto else None
        return LaunchRequest(
            user=self.selection.user,
            base_model=self.selection.require_model(),
            data=self.selection.require_data(),
            settings={} if plan_state else self.values,
            auto=plan_state.request if plan_state else None,
            plan_digest=self.plan_digest if plan_state else None,
            name=self.selection.texts["name"],
            placement=self.selection.get_placement(),
            start_version=self.selection.start_version,
        )


def read_selection(request: AuthenticatedRequest) -> Selection:
    return Selection(request.user, {name: request.POST.get(name, "") for name in FORM_FIELDS})


def read_launch_form(request: AuthenticatedRequest, *, mode: str = "") -> LaunchInput:
    """Read the posted form. `mode` (`auto` or `manual`) overrides the mode of the form."""
    selection = read_selection(request)
    if (mode or request.POST.get("mode")) != "auto":
        return LaunchInput(
            selection, settings_form.parse_form_settings(request.POST), is_auto=False
        )
    return build_planned_input(selection, request.POST)


def build_planned_input(selection: Selection, form_data: Any) -> LaunchInput:
    """Plan with Auto for the selected model and data, with the locks of the form."""
    plan_state = auto_form.build_plan_state(form_data, selection)
    values = auto_form.get_plan_settings(plan_state.plan)
    return LaunchInput(selection, values, True, plan_state, form_data.get("plan_digest", ""))
