"""Make an Auto LLM plan for a model and data of this installation: collect the inputs of
`make_plan`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training.auto.plan import make_plan
from training.auto.plan_types import GOALS, Plan, PlanInputs
from training.catalog.metadata import list_linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import ROW_SETTINGS, RunConfig
from training.engine.memory_estimator import MemoryEstimator
from training.errors import UserError
from training.runs.forecast import token_lengths
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import forecast_memory, get_fixed_overhead
from training.runs.forecast.memory_estimators import get_cached_estimator, get_estimator
from training.runs.forecast.summary import check_data_fits_model, check_excluded_rows
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import TokenLengths, count_trained_within
from training.runs.launch.services import check_model_ready
from training.runs.queue import checks


@dataclass(frozen=True)
class AutoRequest:
    """A request to let Auto choose the settings: the goal, and the settings that the user
    locked.
    """

    goal: str = next(iter(GOALS))
    locked: Mapping[str, Any] = field(default_factory=dict)


class PlanPending(Exception):
    """No plan yet, because `step` has to run first: `lengths` (token lengths) or `memory` (a memory
    estimator).
    """

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class PlanContext:
    """The model, data, token lengths and device that a plan is made for."""

    model: BaseModel
    data: DatasetVersion
    lengths: TokenLengths
    target: TargetDevice


def make_run_plan(
    model: BaseModel,
    data: DatasetVersion,
    auto: AutoRequest,
    target: TargetDevice,
    *,
    wait: bool = True,
) -> Plan:
    """A plan for the current state of the device. With `wait`, missing token lengths are measured
    and missing memory estimators are fitted now (5 s each).

    Raises:
        PlanPending: without `wait`, token lengths or a memory estimator are missing.
        Conflict: the model is not ready.
        UserError: see `make_plan`; or the model cannot be trained on this data.
    """
    check_model_ready(model)
    if wait:
        lengths = token_lengths.get_lengths(data, model)
    else:
        cached = token_lengths.get_cached_lengths(data, model)
        if cached is None:
            raise PlanPending("lengths")
        lengths = cached
    config = RunConfig.from_dict({n: v for n, v in auto.locked.items() if n in ROW_SETTINGS})
    check_excluded_rows(config, data)
    lengths = lengths.exclude_rows(config.excluded_rows)
    check_data_fits_model(lengths, skip_invalid_rows=config.skip_invalid_rows)
    if not lengths.measured_rows:
        raise UserError("The data has no rows to train on.", field="data")
    inputs = build_plan_inputs(
        PlanContext(model, data, lengths, target),
        get_estimator if wait else require_cached_estimator,
    )
    return make_plan(inputs, goal=auto.goal, locked=auto.locked)


def compute_plan_digest(plan: Plan) -> str:
    """A digest of the plan's settings. A launch sends the digest of the plan that the user
    reviewed.
    """
    text = json.dumps(plan.settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_cached_estimator(*arguments: Any) -> MemoryEstimator:
    """Raises PlanPending: the estimator is not cached."""
    estimator = get_cached_estimator(*arguments)
    if estimator is None:
        raise PlanPending("memory")
    return estimator


def build_plan_inputs(
    context: PlanContext, find_estimator: Callable[[Any, RunConfig, str], MemoryEstimator]
) -> PlanInputs:
    """Raises UserError: the model's config.json has no hidden_size."""
    model, data, lengths, target = context.model, context.data, context.lengths, context.target
    if not model.metadata.get("hidden_size"):
        raise UserError(
            f"The config.json of {model.name} has no hidden_size, which Auto needs. Choose Manual "
            "settings.",
            field="model",
        )
    quota_bytes = checks.get_max_bytes(target.pool, data.dataset.team)  # of the team's quota
    total, free = (
        min(available, quota_bytes) if quota_bytes is not None else available
        for available in (target.total, target.free)
    )
    overhead = get_fixed_overhead(target)

    def forecast_config(config: RunConfig) -> Mapping[str, Any]:
        return forecast_memory(
            find_estimator(model.folder, config, target.kind), config, lengths, overhead
        )

    return PlanInputs(
        model=model.name,
        hidden_size=int(model.metadata["hidden_size"]),
        context_length=model.metadata.get("context_length"),
        parameters_per_rank=sum(
            rows + columns for _, (rows, columns) in list_linear_layers(model.folder)
        ),
        rows=lengths.rows,
        eval_rows=data.eval_rows,
        lengths=lengths.total,
        trained_lengths=count_trained_within(lengths, 2**30),
        device=target.name,
        total_bytes=total,
        free_bytes=free,
        forecast_memory=forecast_config,
        count_steps=lambda config: count_steps(lengths, config)[0],
    )
