"""What the launch form says: what was picked, and the settings that were typed or that a plan
chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.people.requests import SignedIn
from training.runs.launch import auto_form, form
from training.runs.launch.selection import NAMES, Picked


@dataclass(frozen=True)
class Asked:
    """What the form says: the settings of the plan with Auto, else those that were typed."""

    picked: Picked
    values: dict[str, Any]
    auto: bool
    planned: auto_form.Planned | None = None


def picked_in(request: SignedIn) -> Picked:
    return Picked(request.user, {name: request.POST.get(name, "") for name in NAMES})


def posted(request: SignedIn, *, mode: str = "") -> Asked:
    """The form as it was sent; `mode` reads it as if Auto, or not, was chosen."""
    picked = picked_in(request)
    if (mode or request.POST.get("mode")) != "auto":
        return Asked(picked, form.settings_from(request.POST), auto=False)
    return with_plan(request, picked)


def with_plan(request: SignedIn, picked: Picked) -> Asked:
    """What Auto makes of the chosen model and data, around the locks of the form."""
    planned = auto_form.planned(request.POST, picked)
    return Asked(picked, auto_form.settings_of(planned.plan), auto=True, planned=planned)
