"""A plan by Auto LLM for a model and data that are here: gathers what `make_plan` needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training.auto.plan import make_plan
from training.auto.situation import GOALS, Plan, PlanInputs
from training.catalog.card import linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.memory_estimator import MemoryEstimator
from training.errors import UserError
from training.runs.forecast import token_lengths
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import constant_part, memory_forecast
from training.runs.forecast.memory_estimators import kept_law, law
from training.runs.forecast.summary import refuse_fault
from training.runs.forecast.target_device import Target
from training.runs.forecast.token_lengths import Lengths, trained_within
from training.runs.launch.services import check_model_ready
from training.runs.queue import checks


@dataclass(frozen=True)
class AutoRequest:
    """Let Auto choose the settings: what the adapter is for, and the settings that must stay."""

    goal: str = next(iter(GOALS))
    locked: Mapping[str, Any] = field(default_factory=dict)


class PlanPending(Exception):
    """A plan cannot be made without waiting for `step`: the token lengths, or a memory law."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Case:
    """What a plan is made for."""

    model: BaseModel
    data: DatasetVersion
    found: Lengths
    target: Target


def make_run_plan(
    model: BaseModel, data: DatasetVersion, auto: AutoRequest, target: Target, *, wait: bool = True
) -> Plan:
    """A plan for the device as it is now. With `wait`, tokens are counted and memory laws are made
    now where nobody has yet (5 s each).

    Raises:
        PlanPending: without `wait`, something is missing.
        Conflict: the model is not ready.
        UserError: see `make_plan`; or the data cannot be trained on with this model.
    """
    check_model_ready(model)
    if wait:
        found = token_lengths.lengths(data, model)
    else:
        kept = token_lengths.kept_lengths(data, model)
        if kept is None:
            raise PlanPending("lengths")
        found = kept
    refuse_fault(found)
    if not found.measured:
        raise UserError("The data has no rows to train on.", field="data")
    situation = situation_of(Case(model, data, found, target), law if wait else kept_only)
    return make_plan(situation, goal=auto.goal, locked=auto.locked)


def plan_digest(plan: Plan) -> str:
    """A plan's settings as one word: a launch names the plan that was on the screen."""
    text = json.dumps(plan.settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_only(*asked: Any) -> MemoryEstimator:
    kept = kept_law(*asked)
    if kept is None:
        raise PlanPending("memory")
    return kept


def situation_of(case: Case, find_law: Callable[[Any, RunConfig, str], MemoryEstimator]) -> PlanInputs:
    model, data, found, target = case.model, case.data, case.found, case.target
    if not model.card.get("hidden_size"):
        raise UserError(
            f"The config.json of {model.name} names no hidden_size, which a plan needs; choose "
            "the settings.",
            field="model",
        )
    most = checks.most_memory(target.pool, data.dataset.team)  # what the quota leaves
    total, free = (
        min(have, most) if most is not None else have for have in (target.total, target.free)
    )
    constant = constant_part(target)

    def need(config: RunConfig) -> Mapping[str, Any]:
        return memory_forecast(find_law(model.folder, config, target.kind), config, found, constant)

    return PlanInputs(
        model=model.name,
        hidden_size=int(model.card["hidden_size"]),
        context_length=model.card.get("context_length"),
        parameters_per_rank=sum(rows + columns for _, (rows, columns) in linear_layers(model.folder)),
        rows=data.train_rows,
        eval_rows=data.heldout_rows,
        lengths=found.total,
        trained_lengths=trained_within(found, 2**30),
        device=target.name,
        total_bytes=total,
        free_bytes=free,
        forecast_memory=need,
        count_steps=lambda config: count_steps(found, config)[0],
    )
