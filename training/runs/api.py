"""Runs in the API: create, read, list, stop, go on; their events after a number and their curves."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from ninja import Query, Router, Schema, Status
from pydantic import ConfigDict, Field

from training.catalog.models import BaseModel
from training.datasets.visible import visible_data
from training.errors import NotFound, UserError
from training.people.requests import SignedIn
from training.people.visible import get_visible
from training.runs import launch
from training.runs.curves import SERIES, read_curves
from training.runs.models import Run
from training.runs.state_words import describe
from training.runs.states import State
from training.runs.stream import as_message, events_after, one_moment

router = Router(tags=["runs"])
MAX_LISTED = 200
MAX_EVENTS = 5_000


class RunIn(Schema):
    """Unknown fields are refused: nobody sets an owner, a state or a lease through this door."""

    model_config = ConfigDict(extra="forbid")
    model: int = Field(ge=0, le=2**53)
    data: int = Field(ge=0, le=2**53, description="id of a data set's version")
    name: str = Field("", max_length=launch.MAX_NAME)
    settings: dict[str, Any] = {}


class StopIn(Schema):
    model_config = ConfigDict(extra="forbid")
    discard: bool = False


class RunOut(Schema):
    id: int
    name: str
    owner: str
    model: str
    data: str
    method: str
    created_at: datetime
    state: dict[str, Any]
    config: dict[str, Any]
    last_seq: int

    @staticmethod
    def resolve_owner(row: Run) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_model(row: Run) -> str:
        return row.base_model.name

    @staticmethod
    def resolve_data(row: Run) -> str:
        return str(row.data)

    @staticmethod
    def resolve_state(row: Run) -> dict[str, Any]:
        return describe(row)


class EventsOut(Schema):
    events: list[dict[str, Any]]
    last_seq: int


RELATED = ("owner", "base_model", "data__dataset")


@router.post("", response={201: RunOut})
def create_run(request: SignedIn, body: RunIn) -> Status[Run]:
    model = BaseModel.objects.filter(pk=body.model).first()
    version = visible_data(request.user, body.data)
    if model is None:
        raise NotFound(f"There is no base model {body.model}.", field="model")
    if version is None:
        raise NotFound(f"There is no data version {body.data} that you may see.", field="data")
    run = launch.launch_run(request.user, base_model=model, data=version, settings=body.settings, name=body.name)
    return Status(201, run)


@router.get("", response=list[RunOut])
def list_runs(
    request: SignedIn,
    state: str = "",
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> Any:
    rows = Run.objects.visible_to(request.user).select_related(*RELATED)
    if state:
        if state not in State.values:
            raise UserError(f"state must be one of {', '.join(State.values)}.", field="state")
        rows = rows.filter(state=state)
    return rows[offset : offset + limit]


@router.get("/{int:run_id}", response=RunOut)
def read_run(request: SignedIn, run_id: int) -> Run:
    return get_visible(Run, request.user, run_id, *RELATED)


@router.post("/{int:run_id}/stop", response=RunOut)
def stop_run(request: SignedIn, run_id: int, body: StopIn) -> Run:
    return launch.stop_run(get_visible(Run, request.user, run_id, *RELATED), discard=body.discard)


@router.post("/{int:run_id}/continue", response=RunOut)
def continue_run(request: SignedIn, run_id: int) -> Run:
    return launch.continue_run(get_visible(Run, request.user, run_id, *RELATED))


@router.get("/{int:run_id}/events", response=EventsOut)
def read_events(
    request: SignedIn,
    run_id: int,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 1000,
) -> dict[str, Any]:
    """Events with numbers after `after`, in order and without gap. Ask again with the `last_seq` of the answer."""
    run = get_visible(Run, request.user, run_id)
    with one_moment():
        events = [as_message(event) for event in events_after(run.pk, after, limit)]
    return {"events": events, "last_seq": events[-1]["seq"] if events else after}


@router.get("/{int:run_id}/metrics")
def read_metrics(
    request: SignedIn,
    run_id: int,
    points: Annotated[int, Query(ge=10, le=10_000)] = 1000,
    first_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    last_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    names: str = "",
) -> dict[str, Any]:
    """Curves with about `points` places; a place stands for many steps with their low, high and mean. Names with commas."""
    run = get_visible(Run, request.user, run_id)
    wanted = [name for name in names.split(",") if name] or list(SERIES)
    unknown = [name for name in wanted if name not in SERIES]
    if unknown:
        raise UserError(f"There is no metric {unknown[0]}; there are {', '.join(SERIES)}.", field="names")
    with one_moment():
        curves = read_curves(run.pk, wanted, points=points, first_step=first_step, last_step=last_step)
    return curves.as_lists()
