"""The selection of the launch form: model, data, pool, priority and start weights. Each is looked
up once per request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import DatasetVersion
from training.datasets.permissions import find_visible_version
from training.errors import NotFound, UserError
from training.gpus.models import Pool
from training.people.models import User
from training.people.requests import parse_int_or_zero
from training.runs.forecast.target_device import TargetDevice, get_target_device
from training.runs.launch.start_version import StartVersion, get_start_version
from training.runs.queue.placement import Placement
from training.runs.states import Priority

FORM_FIELDS = ("model", "data", "name", "pool", "priority", "start_version")


@dataclass(frozen=True)
class Selection:
    """`texts` are the form's fields. A property is None if the object does not exist, is not ready
    or is not visible to the user.
    """

    user: User
    texts: dict[str, str]

    @cached_property
    def model(self) -> BaseModel | None:
        return BaseModel.objects.filter(
            pk=parse_int_or_zero(self.texts["model"]), state=ModelState.READY
        ).first()

    @cached_property
    def version(self) -> DatasetVersion | None:
        return find_visible_version(self.user, parse_int_or_zero(self.texts["data"]))

    @cached_property
    def pool(self) -> Pool | None:
        """None selects the default pool."""
        return (
            Pool.objects.filter(pk=parse_int_or_zero(self.texts["pool"])).first()
            if self.texts["pool"]
            else None
        )

    @cached_property
    def target(self) -> TargetDevice:
        return get_target_device(self.pool)

    def require_model(self) -> BaseModel:
        """The model, even if it is not ready: the launch then raises Conflict.

        Raises:
            NotFound: no model is selected.
        """
        model = (
            self.model
            or BaseModel.objects.filter(pk=parse_int_or_zero(self.texts["model"])).first()
        )
        if model is None:
            raise NotFound("Choose a base model.", field="model")
        return model

    def require_data(self) -> DatasetVersion:
        """Raises NotFound: no visible data is selected."""
        if self.version is None:
            raise NotFound("Choose a dataset.", field="data")
        return self.version

    def get_placement(self) -> Placement:
        """Raises NotFound: the pool no longer exists; UserError: the priority is unknown."""
        if self.texts["pool"] and self.pool is None:
            raise NotFound("This pool no longer exists. Choose another.", field="pool")
        priority = self.texts["priority"] or Priority.NORMAL
        if priority not in Priority.values:
            raise UserError(
                f"priority must be one of {', '.join(Priority.values)}.", field="priority"
            )
        return Placement(self.pool, priority)

    @cached_property
    def start_version(self) -> StartVersion | None:
        """Raises NotFound: the adapter version does not exist or is not visible to the user."""
        version = parse_int_or_zero(self.texts["start_version"])
        return get_start_version(self.user, version) if version else None
