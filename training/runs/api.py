"""API of runs, with the same functions as their pages. Lists are paginated; their filters come from
an allow-list.
"""

from typing import Annotated, Any

from django.http import HttpResponse
from ninja import Query, Router, Schema, Status
from ninja.pagination import paginate
from pydantic import Field

from training.engine.metrics import get_charted_names
from training.errors import UserError
from training.people.pagination import Pagination
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest
from training.runs import actions
from training.runs import filters as runs_filters
from training.runs.launch import api as launch_api
from training.runs.launch import yaml_file
from training.runs.live.messages import event_to_json, read_events_after
from training.runs.metrics.curves import read_curves
from training.runs.models import Event, Run, Sweep
from training.runs.queue import api as queue_api
from training.runs.reads import consistent_read
from training.runs.schemas import (
    ConfirmIn,
    EvalsOut,
    EventsOut,
    MetricsOut,
    RunChange,
    RunFiltersIn,
    RunOut,
    StopIn,
    SweepOut,
)
from training.runs.worker import oom_recovery

router = Router(tags=["runs"])
router.add_router("", launch_api.router)
router.add_router("", queue_api.router)
# All methods of a path must be on one router: ninja returns 405 for methods on a second one.
router.post("", response={201: RunOut})(launch_api.create_run)
MAX_EVENTS = 5_000
RELATED = (*runs_filters.RELATED, "team")


@router.get("/sweeps/{int:sweep_id}", response=SweepOut)
def read_sweep(request: AuthenticatedRequest, sweep_id: int) -> Sweep:
    return get_visible(Sweep, request.user, sweep_id, "owner")


@router.post("/sweeps/{int:sweep_id}/stop", response=SweepOut)
def stop_sweep(request: AuthenticatedRequest, sweep_id: int) -> Sweep:
    """Stop every unfinished run of a sweep and save their adapters."""
    sweep = get_changeable(Sweep, request.user, sweep_id, "owner")
    actions.stop_sweep(sweep)
    return sweep


@router.get("", response=list[RunOut])
@paginate(Pagination)
def list_runs(request: AuthenticatedRequest, filters: Annotated[RunFiltersIn, Query()]) -> Any:
    """The runs that you may see. `sort` is the name of a column, with a leading `-` for descending
    order.
    """
    run_filters = runs_filters.RunFilters.from_query(
        {name: str(value) for name, value in filters.dict().items() if value}
    )
    return runs_filters.filter_runs(request.user, run_filters).defer(None).select_related(*RELATED)


@router.get("/{int:run_id}", response=RunOut)
def read_run(request: AuthenticatedRequest, run_id: int) -> Run:
    return get_visible(Run, request.user, run_id, *RELATED)


@router.patch("/{int:run_id}", response=RunOut)
def change_run(request: AuthenticatedRequest, run_id: int, body: RunChange) -> Run:
    """Change the name, tags or notes of a run, or archive it."""
    run = get_visible(Run, request.user, run_id, *RELATED)
    tags = None if body.tags is None else ",".join(body.tags)
    actions.update_run(request.user, run, name=body.name, tags=tags, notes=body.notes)
    if body.archived is not None:
        actions.archive_run(request.user, run, restore=not body.archived)
    return run


@router.delete("/{int:run_id}", response={204: None})
def delete_run(request: AuthenticatedRequest, run_id: int, body: ConfirmIn) -> Status[None]:
    """Delete a run that has ended, with its files. `name` must be the run's name."""
    actions.delete_run(request.user, get_visible(Run, request.user, run_id), body.name)
    return Status(204, None)


@router.post("/{int:run_id}/stop", response=RunOut)
def stop_run(request: AuthenticatedRequest, run_id: int, body: StopIn) -> Run:
    return actions.stop_run(
        get_changeable(Run, request.user, run_id, *RELATED), discard=body.discard
    )


@router.post("/{int:run_id}/continue", response=RunOut)
def continue_run(request: AuthenticatedRequest, run_id: int) -> Run:
    return actions.continue_run(request.user, get_changeable(Run, request.user, run_id, *RELATED))


@router.get(
    "/{int:run_id}/config",
    response={200: str},
    openapi_extra={"responses": {200: {"content": {"application/yaml": {}}}}},
)
def read_config(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    """The complete run as YAML; `manage.py launch FILE` launches it again."""
    run = get_visible(Run, request.user, run_id, *RELATED)
    return HttpResponse(yaml_file.to_yaml(run), content_type="application/yaml")


@router.get("/{int:run_id}/events", response=EventsOut)
def read_events(
    request: AuthenticatedRequest,
    run_id: int,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 1000,
) -> dict[str, Any]:
    """Events with numbers above `after`, in order and without gaps. For the next page, pass the
    returned `last_seq` as `after`.
    """
    run = get_visible(Run, request.user, run_id)
    with consistent_read():
        events = [event_to_json(event) for event in read_events_after(run.pk, after, limit)]
    return {"events": events, "last_seq": events[-1]["seq"] if events else after}


@router.get("/{int:run_id}/evals", response=EvalsOut)
def read_evals(
    request: AuthenticatedRequest, run_id: int, offset: Annotated[int, Query(ge=0, le=2**53)] = 0
) -> dict[str, Any]:
    """Evaluations on held-out rows, in order, at most 5,000 starting at `offset`. Superseded ones
    are left out.
    """
    run = get_visible(Run, request.user, run_id)
    evals = Event.objects.filter(run=run, kind="eval", superseded=False).order_by("step", "seq")[
        offset : offset + MAX_EVENTS
    ]
    return {"evals": [{"step": row.step, "time": row.time, **row.fields} for row in evals]}


@router.get("/{int:run_id}/metrics", response=MetricsOut)
def read_metrics(
    request: AuthenticatedRequest,
    run_id: int,
    points: Annotated[int, Query(ge=10, le=10_000)] = 1000,
    first_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    last_step: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    names: str = "",
) -> dict[str, Any]:
    """Curves with about `points` points. In a long run a point stands for many steps and has their
    low, high and mean. `names` is a comma-separated list of metrics.
    """
    run = get_visible(Run, request.user, run_id)
    charted = get_charted_names()
    wanted = list(dict.fromkeys(name for name in names.split(",") if name)) or charted
    unknown = [name for name in wanted if name not in charted]
    if unknown:
        raise UserError(
            f"Unknown metric {unknown[0]}. Choose from {', '.join(charted)}.", field="names"
        )
    with consistent_read():
        curves = read_curves(
            run.pk, wanted, points=points, first_step=first_step, last_step=last_step
        )
    return curves.to_lists()


class MemoryOptionOut(Schema):
    name: str
    description: str
    changes: dict[str, Any]
    peak_bytes: int | None = Field(description="null: the step has not been simulated")


@router.get("/{int:run_id}/memory-options", response=list[MemoryOptionOut])
def list_memory_options(request: AuthenticatedRequest, run_id: int) -> list[dict[str, Any]]:
    """Changes that reduce the memory use of a run that ran out of memory, with their forecasts. The
    least intrusive changes come first.
    """
    run = get_visible(Run, request.user, run_id, *RELATED)
    options = oom_recovery.list_recovery_options(run)
    return [
        {**vars(option), "peak_bytes": option.memory["peak"] if option.memory else None}
        for option in options
    ]


@router.post("/{int:run_id}/memory-options/{name}", response=RunOut)
def apply_memory_option(request: AuthenticatedRequest, run_id: int, name: str) -> Run:
    """Apply a change to a failed or stopped run and resume it from its last checkpoint."""
    return oom_recovery.apply_memory_option(
        request.user, get_changeable(Run, request.user, run_id, *RELATED), name
    )
