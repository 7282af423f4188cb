"""The shapes of runs in the API: what comes in is checked here, what goes out is described here, with examples."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Annotated, Any

from ninja import Query, Schema
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.runs import keep, launch
from training.runs.launch_schemas import AutoIn
from training.runs.models import Run, Sweep
from training.runs.state_words import describe
from training.runs.states import Priority

Number = Annotated[int, Query(ge=0, le=2**53)]
EXAMPLE: JsonDict = {
    "model": 1,
    "data": 1,
    "name": "Lights, rank 16",
    "settings": {"rank": 16, "learning_rate": 0.001, "epochs": 2},
}


class RunIn(Schema):
    """Unknown fields are refused: nobody sets an owner, a state or a lease through this door."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})
    model: int = Field(ge=0, le=2**53, description="id of a base model")
    data: int = Field(ge=0, le=2**53, description="id of a data set's version")
    name: str = Field("", max_length=launch.MAX_NAME)
    settings: dict[str, Any] = Field({}, description="see /runs/settings; a list of values spans a sweep")
    auto: AutoIn | None = Field(None, description="choose the settings; then `settings` stays empty")
    priority: Priority | None = Field(None, description="normal if not given; urgent is granted by admins")
    pool: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="the id of one; if not given, of the largest devices"
    )
    accept_warnings: bool = Field(False, description="start although something is unwise")


class RunChange(Schema):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"tags": ["candidate"], "archived": False}]})
    name: str | None = Field(None, max_length=launch.MAX_NAME)
    tags: list[str] | None = Field(None, max_length=keep.MAX_TAGS)
    notes: str | None = Field(None, max_length=keep.MAX_NOTES)
    archived: bool | None = None


class SureIn(Schema):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=200, description="the name of what is deleted")


class StopIn(Schema):
    model_config = ConfigDict(extra="forbid")
    discard: bool = False


class Filters(Schema):
    """What a list of runs can be asked for; nothing else reaches the database."""

    state: str = ""
    model: str = Field("", max_length=200, description="name of the base model")
    owner: str = Field("", max_length=200)
    data: str = Field("", max_length=200, description="name of the data set")
    method: str = Field("", max_length=40)
    q: str = Field("", max_length=100, description="in names, tags and notes")
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
    best_heldout_loss: float | None
    exact_match: float | None = Field(description="share of held-out prompts answered word for word")
    best_step: int | None
    config: dict[str, Any]
    advice: dict[str, Any] = Field(description="the plan that Auto LLM made for it; empty without")
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
        return describe(row)


class SweepOut(Schema):
    id: int
    name: str
    grid: dict[str, list[Any]]
    created_at: datetime
    runs: list[int]

    @staticmethod
    def resolve_runs(row: Sweep) -> list[int]:
        return list(row.runs.order_by("pk").values_list("pk", flat=True))


class SettingOut(Schema):
    name: str
    type: str
    default: Any
    words: str
    usual: str
    choices: list[str]
    lowest: float | None
    highest: float | None
    methods: list[str] = Field(description="techniques that have it; empty: all")


def settings_described() -> list[dict[str, Any]]:
    return [
        {
            "name": f.name,
            "type": str(f.type),
            "default": f.default,
            "words": f.metadata["words"],
            "usual": f.metadata["usual"],
            "choices": list(f.metadata["choices"]),
            "lowest": (f.metadata["within"] or (None, None))[0],
            "highest": (f.metadata["within"] or (None, None))[1],
            "methods": [name for name, method in TABLE.items() if f.name in method.settings],
        }
        for f in dataclasses.fields(RunConfig)
        if f.name not in launch.OWN_SETTINGS
    ]


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
