"""Request and response schemas of runs in the API, with examples."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ninja import Schema
from pydantic import ConfigDict, Field

from training.runs import models
from training.runs.models import Run, Sweep
from training.runs.status import get_run_status


class RunChange(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"tags": ["candidate"], "archived": False}]}
    )
    name: str | None = Field(None, max_length=models.MAX_NAME_LENGTH)
    tags: list[str] | None = Field(None, max_length=models.MAX_TAGS)
    notes: str | None = Field(None, max_length=models.MAX_NOTES_LENGTH)
    archived: bool | None = None


class ConfirmIn(Schema):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=200, description="the name of the object to delete")


class StopIn(Schema):
    model_config = ConfigDict(extra="forbid")
    discard: bool = False


class RunFiltersIn(Schema):
    """Query parameters of the list of runs. No other parameter reaches the database."""

    state: str = ""
    model: str = Field("", max_length=200, description="name of the base model")
    owner: str = Field("", max_length=200)
    data: str = Field("", max_length=200, description="name of the dataset")
    method: str = Field("", max_length=40)
    q: str = Field("", max_length=100, description="search text in names, tags and notes")
    tag: str = Field("", max_length=40)
    sort: str = Field("-started", max_length=20)
    archived: bool = False


class RunOut(Schema):
    id: int
    name: str
    owner: str
    team: str | None
    model: str
    data: str
    data_id: int
    method: str
    sweep_id: int | None
    tags: list[str]
    notes: str
    archived: bool
    created_at: datetime
    state: dict[str, Any]
    best_eval_loss: float | None
    exact_match: float | None = Field(
        description="share of held-out prompts whose answer is exactly the expected one"
    )
    best_step: int | None
    config: dict[str, Any]
    auto_plan: dict[str, Any] = Field(
        description="the plan that Auto LLM made for it; empty without"
    )
    last_seq: int

    @staticmethod
    def resolve_owner(row: Run) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_team(row: Run) -> str | None:
        return row.team.name if row.team else None

    @staticmethod
    def resolve_model(row: Run) -> str:
        return row.base_model.name

    @staticmethod
    def resolve_data(row: Run) -> str:
        return str(row.data)

    @staticmethod
    def resolve_tags(row: Run) -> list[str]:
        return row.tag_list

    @staticmethod
    def resolve_archived(row: Run) -> bool:
        return row.archived_at is not None

    @staticmethod
    def resolve_state(row: Run) -> dict[str, Any]:
        return get_run_status(row)


class SweepOut(Schema):
    id: int
    name: str
    grid: dict[str, list[Any]]
    created_at: datetime
    runs: list[int]

    @staticmethod
    def resolve_runs(row: Sweep) -> list[int]:
        return list(row.runs.order_by("pk").values_list("pk", flat=True))


class EventsOut(Schema):
    events: list[dict[str, Any]]
    last_seq: int


class EvalsOut(Schema):
    evals: list[dict[str, Any]]


class MetricsOut(Schema):
    points: int
    raw: bool
    axes: dict[str, list[float | None]]
    series: dict[str, dict[str, list[float | None]]]
