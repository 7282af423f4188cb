"""API schemas of launches, plans, forecasts, token lengths and settings."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from ninja import Query, Schema
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from training.auto.plan_types import GOALS
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.runs import models
from training.runs.launch import services
from training.runs.states import Priority

EXAMPLE_MODEL: JsonDict = {
    "config": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 512,
    },
    "settings": {"method": "lora"},
}


class AutoIn(Schema):
    """Let Auto LLM choose the settings, except those in `locked`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"goal": "task", "locked": {"rank": 32}}]}
    )
    goal: str = Field(
        "task",
        max_length=40,
        description=", ".join(f"{name}: {description}" for name, (_, description) in GOALS.items()),
    )
    locked: dict[str, Any] = {}


class PlanIn(AutoIn):
    model: int = Field(ge=0, le=2**53, description="id of a base model")
    data: int = Field(ge=0, le=2**53, description="id of a dataset's version")
    pool: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="id of the pool to plan for"
    )


class PlanOut(Schema):
    goal: str
    settings: dict[str, Any]
    choices: list[dict[str, Any]] = Field(
        description="setting, value, why, alternative, source, locked"
    )
    facts: dict[str, Any]


class ForecastOut(Schema):
    runs: int
    forecast: dict[str, Any] = Field(description="of the first run; `warnings` are of all runs")
    plan: PlanOut | None = Field(description="with `auto`")
    plan_digest: str = Field(description="send it with a launch to start exactly this plan")


class ModelForecastIn(Schema):
    """Any causal language model by its config.json. The batch has `rows` x `length` tokens, all
    trained.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE_MODEL]})
    config: dict[str, Any] = Field(description="the model's config.json")
    settings: dict[str, Any] = Field({}, description="settings of a run, one value each")
    rows: int = Field(1, ge=1, le=4096)
    length: int = Field(2048, ge=8, le=131_072)
    device: Literal["cpu", "cpu_fp32", "cuda"] = "cuda"


class ModelForecastOut(Schema):
    """Memory in bytes."""

    load: int
    step: int
    eval: int
    peak: int
    kinds: dict[str, int] = Field(description="of the training peak, by kind")
    trainable: int
    precision: str
    optimizer: str


class LengthsOut(Schema):
    rows: int
    measured_rows: int
    longest: int
    truncated: int
    empty: int
    tokens: int
    answer_tokens: int
    template: str
    fault: str
    invalid: int
    invalid_numbers: list[int]
    special_token_rows: int
    histogram: dict[str, list[int]]


class TokensOut(Schema):
    template: str
    rows: list[dict[str, Any]]


IdParam = Annotated[int, Query(ge=0, le=2**53)]


EXAMPLE_RUN: JsonDict = {
    "model": 1,
    "data": 1,
    "name": "Lights, rank 16",
    "settings": {"rank": 16, "learning_rate": 0.001, "epochs": 2},
}


class RunIn(Schema):
    """Unknown fields are rejected, so that clients cannot set owner, state or lease."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE_RUN]})
    model: int = Field(ge=0, le=2**53, description="id of a base model")
    data: int = Field(ge=0, le=2**53, description="id of a dataset's version")
    name: str = Field("", max_length=models.MAX_NAME_LENGTH)
    settings: dict[str, Any] = Field(
        {}, description="see GET /runs/settings; a list of values spans a sweep"
    )
    auto: AutoIn | None = Field(
        None, description="let Auto LLM choose the settings; `settings` must be empty"
    )
    priority: Priority | None = Field(
        None, description="default: normal; only admins can set urgent"
    )
    pool: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="id of a pool; default: the pool of the best device"
    )
    start_version: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="id of the adapter version whose weights the run starts from"
    )
    plan_digest: str | None = Field(
        None,
        max_length=64,
        description="with `auto`: from a forecast; 409 if the plan has changed since",
    )
    accept_warnings: bool = Field(False, description="start in spite of warnings")


class SettingOut(Schema):
    name: str
    type: str
    default: Any
    description: str
    recommended: str
    choices: list[str]
    minimum: float | None
    maximum: float | None
    methods: list[str] = Field(description="methods that have this setting; empty: all")


def describe_settings() -> list[dict[str, Any]]:
    return [
        {
            "name": f.name,
            "type": str(f.type),
            "default": f.default,
            "description": f.metadata["description"],
            "recommended": f.metadata["recommended"],
            "choices": list(f.metadata["choices"]),
            "minimum": (f.metadata["bounds"] or (None, None))[0],
            "maximum": (f.metadata["bounds"] or (None, None))[1],
            "methods": [name for name, method in METHODS.items() if f.name in method.settings],
        }
        for f in dataclasses.fields(RunConfig)
        if f.name not in services.INTERNAL_SETTINGS
    ]
