"""Options of selects: base models."""

from typing import Any

from training.catalog.models import BaseModel, ModelState
from training.people.models import User
from training.people.options import Option, OptionSource


def find_ready_models(_user: User, text: str) -> Any:
    return find_offered_models(_user, text).filter(state=ModelState.READY)


def find_offered_models(_user: User, text: str) -> Any:
    """Those that are ready or will be."""
    models = BaseModel.objects.exclude(state=ModelState.FAILED).defer("metadata")
    return models.filter(name__icontains=text).order_by("name")


def to_option(model: BaseModel) -> Option:
    reason = "" if model.state == ModelState.READY else model.get_state_display().lower()
    return Option(str(model.pk), model.name, reason)


READY_MODELS = OptionSource("ready-models", find_ready_models, to_option)
OFFERED_MODELS = OptionSource("offered-models", find_offered_models, to_option)
