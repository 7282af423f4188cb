"""The shapes of what the API tells before a launch: plans, forecasts, lengths and tokens."""

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
    """Let Auto LLM choose the settings; `locked` holds those that it must keep."""

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
    data: int = Field(ge=0, le=2**53, description="id of a data set's version")
    pool: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="id of the devices that it is planned for"
    )


class PlanOut(Schema):
    goal: str
    settings: dict[str, Any]
    choices: list[dict[str, Any]] = Field(
        description="setting, value, why, instead, source, locked"
    )
    facts: dict[str, Any]


class ForecastOut(Schema):
    runs: int
    forecast: dict[str, Any] = Field(
        description="of the first run; `warnings` are those of all runs"
    )
    plan: PlanOut | None = Field(description="with `auto`")
    plan_digest: str = Field(description="launch with it, and no other plan is started")


class ModelForecastIn(Schema):
    """Any causal language model by its config.json; the batch is `rows` x `length`, all of it
    trained.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE_MODEL]})
    config: dict[str, Any] = Field(description="the model's config.json")
    settings: dict[str, Any] = Field({}, description="of a run; one value each")
    rows: int = Field(1, ge=1, le=4096)
    length: int = Field(2048, ge=8, le=131_072)
    device: Literal["cpu", "cpu_fp32", "cuda"] = "cuda"


class ModelForecastOut(Schema):
    """Bytes."""

    load: int
    step: int
    eval: int
    peak: int
    kinds: dict[str, int] = Field(description="of the fullest moment of a step")
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
    """Unknown fields are refused: nobody sets an owner, a state or a lease by this request."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE_RUN]})
    model: int = Field(ge=0, le=2**53, description="id of a base model")
    data: int = Field(ge=0, le=2**53, description="id of a data set's version")
    name: str = Field("", max_length=models.MAX_NAME_LENGTH)
    settings: dict[str, Any] = Field(
        {}, description="see /runs/settings; a list of values spans a sweep"
    )
    auto: AutoIn | None = Field(
        None, description="choose the settings; then `settings` stays empty"
    )
    priority: Priority | None = Field(
        None, description="normal if not given; urgent is granted by admins"
    )
    pool: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="the id of one; if not given, of the largest devices"
    )
    from_version: Annotated[int, Field(ge=0, le=2**53)] | None = Field(
        None, description="id of an adapter version whose weights the run begins with"
    )
    plan_digest: str | None = Field(
        None,
        max_length=64,
        description="with `auto`: of the plan that a forecast told; another plan is refused (409)",
    )
    accept_warnings: bool = Field(False, description="start although something is unwise")


class SettingOut(Schema):
    name: str
    type: str
    default: Any
    description: str
    recommended: str
    choices: list[str]
    minimum: float | None
    maximum: float | None
    methods: list[str] = Field(description="techniques that have it; empty: all")


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
