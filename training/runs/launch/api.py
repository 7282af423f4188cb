"""What the API tells before a launch: settings, plan, forecast, and the data as a model sees it."""

from typing import Annotated, Any

from ninja import Query, Router

from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.datasets.preview import raw_rows
from training.datasets.visible import visible_data
from training.engine.config import RunConfig
from training.errors import NotFound
from training.gpus.models import Pool
from training.people.requests import SignedIn
from training.runs.forecast import any_model, token_lengths
from training.runs.forecast.summary import forecast
from training.runs.forecast.target_device import target_of
from training.runs.launch import auto, sweep
from training.runs.launch.schemas import (
    ForecastOut,
    LengthsOut,
    ModelForecastIn,
    ModelForecastOut,
    Number,
    PlanIn,
    PlanOut,
    RunIn,
    SettingOut,
    TokensOut,
    settings_described,
)
from training.runs.queue.placement import Where
from training.runs.states import Priority

router = Router(tags=["runs"])


def model_and_data(request: SignedIn, body: Any) -> dict[str, Any]:
    """Raises NotFound: one of them is not there, or not for the person to see."""
    model = BaseModel.objects.filter(pk=body.model).first()
    version = visible_data(request.user, body.data)
    if model is None:
        raise NotFound(f"There is no base model {body.model}.", field="model")
    if version is None:
        raise NotFound(f"There is no data version {body.data} that you may see.", field="data")
    return {"base_model": model, "data": version}


def where_of(body: RunIn) -> Where:
    """Raises NotFound: there are no such devices."""
    return Where(
        None if body.pool is None else pool_of(body.pool), body.priority or Priority.NORMAL
    )


def pool_of(pool_id: int) -> Pool:
    """Raises NotFound: there is none."""
    pool = Pool.objects.filter(pk=pool_id).first()
    if pool is None:
        raise NotFound(f"There is no pool {pool_id}.", field="pool")
    return pool


def ready_model_and_data(
    request: SignedIn, model: int, data: int
) -> tuple[BaseModel, DatasetVersion]:
    base = BaseModel.objects.filter(pk=model, state="ready").first()
    version = visible_data(request.user, data)
    if base is None or version is None:
        raise NotFound(
            "There is no such model that is ready, or no such data version that you may see."
        )
    return base, version


@router.get("/settings", response=list[SettingOut])
def list_settings(request: SignedIn) -> Any:
    """Every setting of a run with its default, its range and a sentence."""
    return settings_described()


@router.post("/forecast", response=ForecastOut)
def read_forecast(request: SignedIn, body: RunIn) -> dict[str, Any]:
    """What a launch would do: the card of the launch page. Steps and tokens are there once the
    lengths are measured.
    """
    asked = model_and_data(request, body)
    everyone = sweep.members(body.settings)
    config = RunConfig.from_dict(everyone[0])
    found = token_lengths.kept_lengths(
        asked["data"], asked["base_model"], train_on_prompt=config.train_on_prompt
    )
    target = target_of(where_of(body).pool)
    return {
        "runs": len(everyone),
        "will": forecast(config, asked["base_model"], asked["data"], found, target),
    }


@router.post("/forecast/model", response=ModelForecastOut)
def read_model_forecast(request: SignedIn, body: ModelForecastIn) -> Any:
    """Memory that any model would take, from its config.json alone: no weights are needed. Takes 5
    to 20 s.
    """
    return any_model.forecast_of(
        body.config, body.settings, rows=body.rows, length=body.length, device=body.device
    )


@router.post("/plan", response=PlanOut)
def read_plan(request: SignedIn, body: PlanIn) -> Any:
    """What Auto LLM would do, with the reason for each choice. The first time for a model and data
    takes some seconds.
    """
    base, version = ready_model_and_data(request, body.model, body.data)
    pool = None if body.pool is None else pool_of(body.pool)
    plan = auto.plan_now(base, version, goal=body.goal, locked=body.locked, pool=pool)
    return {**plan.to_json(), "settings": plan.settings}


@router.get("/lengths", response=LengthsOut)
def read_lengths(
    request: SignedIn,
    model: Number,
    data: Number,
    max_length: Annotated[int, Query(ge=8, le=131_072)] = 512,
) -> Any:
    """Token lengths of a data version as a model sees it; measured now if nobody has yet
    (seconds).
    """
    base, version = ready_model_and_data(request, model, data)
    found = token_lengths.lengths(version, base)
    return {**token_lengths.cut_at(found, max_length), "histogram": token_lengths.histogram(found)}


@router.get("/tokens", response=TokensOut)
def read_tokens(
    request: SignedIn,
    model: Number,
    data: Number,
    split: Annotated[str, Query(pattern="^(train|heldout|test)$")] = "train",
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    max_length: Annotated[int, Query(ge=8, le=131_072)] = 512,
) -> Any:
    """Four rows as a model sees them: pieces of trained (t), masked (m) and cut-off (c) tokens."""
    base, version = ready_model_and_data(request, model, data)
    rows = raw_rows(version, split, offset, 4)
    return token_lengths.tokens_of(base, rows, max_length=max_length, train_on_prompt=False)
