"""What the launch form says: what was picked, and the settings that were typed or that a plan
chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.people.requests import SignedIn
from training.runs.launch import auto_form, form
from training.runs.launch.request import LaunchRequest
from training.runs.launch.selection import NAMES, Picked


@dataclass(frozen=True)
class LaunchInput:
    """What the form says: the settings of the plan with Auto, else those that were typed."""

    picked: Picked
    values: dict[str, Any]
    auto: bool
    planned: auto_form.Planned | None = None
    plan_digest: str | None = None  # of the plan that was on the screen

    def to_request(self) -> LaunchRequest:
        """Raises NotFound: model, data, devices or the version to begin with are not there."""
        planned = self.planned if self.auto else None
        return LaunchRequest(
            user=self.picked.user,
            base_model=self.picked.must_have_model(),
            data=self.picked.must_have_data(),
            settings={} if planned else self.values,
            auto=planned.request if planned else None,
            plan_digest=self.plan_digest if planned else None,
            name=self.picked.texts["name"],
            placement=self.picked.placement(),
            start_weights=self.picked.start_weights,
        )


def picked_in(request: SignedIn) -> Picked:
    return Picked(request.user, {name: request.POST.get(name, "") for name in NAMES})


def posted(request: SignedIn, *, mode: str = "") -> LaunchInput:
    """The form as it was sent; `mode` reads it as if Auto, or not, was chosen."""
    picked = picked_in(request)
    if (mode or request.POST.get("mode")) != "auto":
        return LaunchInput(picked, form.settings_from(request.POST), auto=False)
    return with_plan(picked, request.POST)


def with_plan(picked: Picked, posted: Any) -> LaunchInput:
    """What Auto makes of the chosen model and data, around the locks of the form."""
    planned = auto_form.planned(posted, picked)
    values = auto_form.settings_of(planned.plan)
    return LaunchInput(picked, values, True, planned, posted.get("plan", ""))
