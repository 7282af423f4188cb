"""Auto LLM for a model and data that are here: gathers what a plan needs, and starts a run with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import transaction

from training.auto.plan import make_plan
from training.auto.situation import Plan, Situation
from training.catalog.card import linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.memory_estimator import Law
from training.errors import UserError
from training.gpus.models import Pool
from training.people.models import User
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import constant_part, memory_forecast
from training.runs.forecast.memory_estimators import kept_law, law
from training.runs.forecast.summary import refuse_fault
from training.runs.forecast.target_device import Target, target_of
from training.runs.forecast.token_lengths import Lengths, lengths, trained_within
from training.runs.launch.services import launch_run, refuse_unready
from training.runs.models import Run
from training.runs.queue import checks
from training.runs.queue.placement import ANYWHERE, Where


def launch_planned(
    user: User,
    plan: Plan,
    *,
    base_model: BaseModel,
    data: DatasetVersion,
    name: str = "",
    where: Where = ANYWHERE,
) -> Run:
    """Start a run with a plan's settings; the plan stays with it.

    Raises:
        ConfigError, Conflict: see `launch_run`.
    """
    with transaction.atomic():
        run = launch_run(
            user, base_model=base_model, data=data, settings=plan.settings, name=name, where=where
        )
        run.advice = plan.to_json()
        run.save(update_fields=["advice"])
    return run


class NotSimulated(Exception):
    """A memory law that the plan needs has not been made; `laws.law` takes seconds for it."""


@dataclass(frozen=True)
class Case:
    """What a plan is made for."""

    model: BaseModel
    data: DatasetVersion
    found: Lengths
    target: Target


def plan_now(
    model: BaseModel,
    data: DatasetVersion,
    *,
    goal: str = "task",
    locked: Mapping[str, Any] | None = None,
    pool: Pool | None = None,
) -> Plan:
    """A plan, with the tokens counted and the steps simulated now if nobody has yet (seconds).

    Raises:
        Conflict: the model is not ready.
        UserError: see `lengths` and `plan_for`.
    """
    refuse_unready(model)
    return plan_for(
        Case(model, data, lengths(data, model), target_of(pool)), goal=goal, locked=locked
    )


def plan_for(
    case: Case, *, goal: str = "task", locked: Mapping[str, Any] | None = None, wait: bool = True
) -> Plan:
    """A plan for the device as it is now. `wait`: make the memory laws that are missing, 5 s each.

    Raises:
        NotSimulated: a law is missing and may not be waited for.
        UserError: see `make_plan`; or the data cannot be trained on with this model.
    """
    refuse_fault(case.found)
    if not case.found.measured:
        raise UserError("The data has no rows to train on.", field="data")
    return make_plan(situation_of(case, law if wait else kept_only), goal=goal, locked=locked)


def kept_only(*asked: Any) -> Law:
    kept = kept_law(*asked)
    if kept is None:
        raise NotSimulated
    return kept


def situation_of(case: Case, find_law: Callable[[Any, RunConfig, str], Law]) -> Situation:
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

    return Situation(
        model=model.name,
        hidden_size=int(model.card["hidden_size"]),
        context_length=model.card.get("context_length"),
        parameters_a_rank=sum(rows + columns for _, (rows, columns) in linear_layers(model.folder)),
        rows=data.train_rows,
        heldout_rows=data.heldout_rows,
        lengths=found.total,
        trained=trained_within(found, 2**30),
        device=target.name,
        total=total,
        free=free,
        need=need,
        steps=lambda config: count_steps(found, config)[0],
    )
