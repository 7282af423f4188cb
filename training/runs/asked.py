"""What the launch form says: model, data, and the settings that were typed or that a plan chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import DatasetVersion
from training.datasets.visible import visible_data
from training.errors import NotFound
from training.people.requests import SignedIn, number
from training.runs import form, plan_form

CHOSEN = ("model", "data", "name")


@dataclass(frozen=True)
class Asked:
    """What the form says: the settings of the plan with Auto, else those that were typed."""

    chosen: dict[str, str]
    values: dict[str, Any]
    auto: bool
    planned: plan_form.Planned | None = None


def posted(request: SignedIn, *, mode: str = "") -> Asked:
    """The form as it was sent; `mode` reads it as if Auto, or not, was chosen."""
    chosen = {name: request.POST.get(name, "") for name in CHOSEN}
    if (mode or request.POST.get("mode")) != "auto":
        return Asked(chosen, form.settings_from(request.POST), auto=False)
    return with_plan(request, chosen)


def with_plan(request: SignedIn, chosen: dict[str, str]) -> Asked:
    """What Auto makes of the chosen model and data, around the locks of the form."""
    planned = plan_form.planned(request.POST, ready_model(chosen["model"]), visible_data(request.user, number(chosen["data"])))
    return Asked(chosen, plan_form.settings_of(planned.plan), auto=True, planned=planned)


def ready_model(text: str) -> BaseModel | None:
    return BaseModel.objects.filter(pk=number(text), state=ModelState.READY).first()


def chosen_model(text: str) -> BaseModel:
    model = BaseModel.objects.filter(pk=number(text)).first()
    if model is None:
        raise NotFound("Choose a base model.", field="model")
    return model


def chosen_version(request: SignedIn, text: str) -> DatasetVersion:
    version = visible_data(request.user, number(text))
    if version is None:
        raise NotFound("Choose a data set.", field="data")
    return version
