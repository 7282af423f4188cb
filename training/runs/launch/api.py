"""API endpoints to launch runs and sweeps, and to get settings, plans, forecasts, token lengths and
token previews before a launch.
"""

from typing import Annotated, Any

from ninja import Query, Router, Status

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.datasets.permissions import get_visible_version
from training.datasets.preview import load_rows
from training.errors import NotFound, UserError
from training.gpus.quotas import get_pool
from training.people.requests import AuthenticatedRequest
from training.runs.forecast import any_model, token_lengths
from training.runs.forecast.target_device import get_target_device
from training.runs.launch.auto import AutoRequest, make_run_plan
from training.runs.launch.request import LaunchRequest, launch_runs, preview_launch
from training.runs.launch.schemas import (
    ForecastOut,
    IdParam,
    LengthsOut,
    ModelForecastIn,
    ModelForecastOut,
    PlanIn,
    PlanOut,
    RunIn,
    SettingOut,
    TokensOut,
    describe_settings,
)
from training.runs.launch.start_version import get_start_version
from training.runs.launch.sweep import split_grid
from training.runs.queue.placement import Placement
from training.runs.schemas import SweepOut
from training.runs.states import Priority

router = Router(tags=["runs"])


def to_launch_request(request: AuthenticatedRequest, body: RunIn) -> LaunchRequest:
    """Raises NotFound: the model, data, pool or adapter version does not exist or is not visible to
    the user.
    """
    model = BaseModel.objects.filter(pk=body.model).first()
    if model is None:
        raise NotFound(f"Base model {body.model} not found.", field="model")
    version = get_visible_version(request.user, body.data)
    pool = None if body.pool is None else get_pool(body.pool)
    start_version = None
    if body.start_version is not None:
        start_version = get_start_version(request.user, body.start_version)
    return LaunchRequest(
        user=request.user,
        base_model=model,
        data=version,
        settings=body.settings,
        auto=None if body.auto is None else AutoRequest(body.auto.goal, body.auto.locked),
        plan_digest=body.plan_digest,
        name=body.name,
        placement=Placement(pool, body.priority or Priority.NORMAL),
        start_version=start_version,
    )


def get_ready_model_and_data(
    request: AuthenticatedRequest, model: int, data: int
) -> tuple[BaseModel, DatasetVersion]:
    base = BaseModel.objects.filter(pk=model, state="ready").first()
    if base is None:
        raise NotFound(f"Base model {model} not found or not ready.", field="model")
    return base, get_visible_version(request.user, data)


@router.get("/settings", response=list[SettingOut])
def list_settings(request: AuthenticatedRequest) -> Any:
    """All settings of a run, each with its default, range and description."""
    return describe_settings()


def create_run(request: AuthenticatedRequest, body: RunIn) -> Status[Any]:
    """Start one run. Responds with 409 if there are warnings and `accept_warnings` is false.
    Settings with lists of values belong to /runs/sweeps.
    """
    _, grid = split_grid(body.settings)
    if grid:
        raise UserError(
            f"{next(iter(grid))} has several values. POST to /api/v1/runs/sweeps to start a sweep.",
            field="settings",
        )
    launch_request = to_launch_request(request, body)
    return Status(201, launch_runs(launch_request, accept_warnings=body.accept_warnings))


@router.post("/sweeps", response={201: SweepOut})
def create_sweep(request: AuthenticatedRequest, body: RunIn) -> Status[Any]:
    """Start a run for every combination of the settings that are lists."""
    if body.auto is not None:
        raise UserError(
            "A sweep cannot use `auto`. POST to /api/v1/runs, or send the sweep's settings.",
            field="auto",
        )
    launch_request = to_launch_request(request, body)
    return Status(
        201, launch_runs(launch_request, accept_warnings=body.accept_warnings, as_sweep=True)
    )


@router.post("/forecast", response=ForecastOut)
def read_forecast(request: AuthenticatedRequest, body: RunIn) -> dict[str, Any]:
    """What a launch would do: the launch page's summary, with the warnings of every run of a sweep.
    Steps and tokens are included once the token lengths are measured. With `auto` this makes the
    same plan as a launch, which takes some seconds the first time.
    """
    launch_preview = preview_launch(to_launch_request(request, body))
    plan = launch_preview.plan and {
        **launch_preview.plan.to_json(),
        "settings": launch_preview.plan.settings,
    }
    return {
        "runs": launch_preview.runs,
        "forecast": launch_preview.forecast,
        "plan": plan,
        "plan_digest": launch_preview.plan_digest,
    }


@router.post("/forecast/model", response=ModelForecastOut)
def read_model_forecast(request: AuthenticatedRequest, body: ModelForecastIn) -> Any:
    """The memory that training any model would need, from its config.json without weights. Takes 5
    to 20 s.
    """
    return any_model.forecast_any_model(
        body.config, body.settings, rows=body.rows, length=body.length, device=body.device
    )


@router.post("/plan", response=PlanOut)
def read_plan(request: AuthenticatedRequest, body: PlanIn) -> Any:
    """The settings that Auto LLM would choose, with the reason for each. Takes some seconds for a
    new model or new data.
    """
    base, version = get_ready_model_and_data(request, body.model, body.data)
    target = get_target_device(None if body.pool is None else get_pool(body.pool))
    plan = make_run_plan(base, version, AutoRequest(body.goal, body.locked), target)
    return {**plan.to_json(), "settings": plan.settings}


@router.get("/lengths", response=LengthsOut)
def read_lengths(
    request: AuthenticatedRequest,
    model: IdParam,
    data: IdParam,
    max_length: Annotated[int, Query(ge=8, le=131_072)] = 512,
) -> Any:
    """Token lengths of a dataset version with a model's tokenizer. They are measured now if they
    are not cached, which takes seconds.
    """
    base, version = get_ready_model_and_data(request, model, data)
    lengths = token_lengths.get_lengths(version, base)
    return {
        **token_lengths.get_truncation_stats(lengths, max_length),
        "histogram": token_lengths.build_histogram(lengths),
    }


@router.get("/tokens", response=TokensOut)
def read_tokens(
    request: AuthenticatedRequest,
    model: IdParam,
    data: IdParam,
    split: Annotated[str, Query(pattern="^(train|eval|test)$")] = "train",
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    max_length: Annotated[int, Query(ge=8, le=131_072)] = 512,
) -> Any:
    """Four rows as token spans: trained (t), masked (m) and truncated (c)."""
    base, version = get_ready_model_and_data(request, model, data)
    rows = load_rows(version, split, offset, 4)
    return token_lengths.preview_tokens(base, rows, max_length=max_length, train_on_prompt=False)
