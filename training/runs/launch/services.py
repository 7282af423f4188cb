"""Launch a run, stop it, let it go on: what people do to runs. It knows no torch and no request."""

from __future__ import annotations

import json
import shutil
from typing import Any

from django.db import transaction
from django.utils import timezone

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.errors import Conflict, NotAllowed, UserError, one_line
from training.gpus.scheduling.state import NOBODY, Request
from training.people.models import Role, Team, User
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import kept_forecast
from training.runs.forecast.memory_ladder import nearest
from training.runs.forecast.target_device import Target, target_of
from training.runs.forecast.token_lengths import kept_lengths
from training.runs.models import (
    MAX_NAME,
    Run,
)
from training.runs.queue import actions, checks
from training.runs.queue.placement import ANYWHERE, Where
from training.runs.signals import run_queued

MOST_STEPS = 2**31 - 1  # that the column holds
# What the launch form may not say: the run's place on the disk is SnapML's business.
OWN_SETTINGS = frozenset({"model", "model_name", "train_data", "heldout_data", "start_weights"})


class Unwise(UserError):
    """Nothing is wrong, but something is seldom meant; the launch goes through when it is told that
    this is known.
    """

    status = 409

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(
            " ".join(warnings) + " To start anyway, accept the warnings.", field="accept_warnings"
        )
        self.warnings = warnings


def read_settings(settings: dict[str, Any]) -> RunConfig:
    """Raises ConfigError: a setting is wrong, `field` names it; UserError: one that is not the
    launch's business.
    """
    forbidden = sorted(OWN_SETTINGS & settings.keys())
    if forbidden:
        raise UserError(f"{forbidden[0]} is set by SnapML, not by the launch.", field=forbidden[0])
    return RunConfig.from_dict(settings)


def launch_run(
    user: User,
    *,
    base_model: BaseModel,
    data: DatasetVersion,
    settings: dict[str, Any],
    name: str = "",
    where: Where = ANYWHERE,
) -> Run:
    """Check the settings with the engine's own class, write the run's folder, and ring the workers
    once it is committed.

    Raises:
        ConfigError: a setting is wrong; `field` names it.
        Conflict: the model is not ready, or the queue has as many of the person's runs as it may;
            NotAllowed: see `refuse_class`.
        UserError: no device or quota would ever take it.
    """
    config = refuse_early(user, base_model, settings, where)
    team, target = team_of(user, data), target_of(where.pool)
    foreseen = foresee(config, base_model, data, target)
    request = Request(
        0, team.pk if team else NOBODY, user.pk, 0.0, foreseen["forecast"].get("peak")
    )
    checks.refuse_hopeless(
        request, target.pool, lambda most: nearest(config, base_model, data, most, target)
    )
    with transaction.atomic():
        checks.refuse_full_queue(user)
        run = Run.objects.create(
            owner=user,
            team=team,
            name=(one_line(name) or f"{data.dataset.name}, {TABLE[config.method].title}")[
                :MAX_NAME
            ],
            base_model=base_model,
            data=data,
            method=config.method,
            config=settings_of(config),
            **foreseen,
            pool=target.pool,
            priority=where.priority,
            queued_at=timezone.now(),
        )
        actions.note_class(user, run)
        write_folder(run, config)
        transaction.on_commit(lambda: run_queued.send(Run, run_id=run.pk))
    return run


def foresee(
    config: RunConfig, model: BaseModel, data: DatasetVersion, target: Target
) -> dict[str, Any]:
    """A run's steps and memory, as far as the data's lengths and the technique's law are known."""
    lengths = kept_lengths(data, model, train_on_prompt=config.train_on_prompt)
    steps = count_steps(lengths, config)[0] if lengths else config.max_steps
    return {
        "total_steps": min(steps, MOST_STEPS),
        "forecast": kept_forecast(config, model, lengths, target) or {},
    }


def refuse_early(
    user: User, base_model: BaseModel, settings: dict[str, Any], where: Where
) -> RunConfig:
    """What needs no look at data or devices; the settings as the engine has them."""
    refuse_unready(base_model)
    checks.refuse_class(user, where.priority)
    return read_settings(settings)


def refuse_unready(model: BaseModel) -> None:
    """Raises Conflict: the model's weights are not there yet."""
    if model.state != ModelState.READY:
        raise Conflict(
            f"{model.name} is not ready yet ({model.get_state_display().lower()}).", field="model"
        )


def write_folder(run: Run, config: RunConfig) -> None:
    """The folder that the engine is started on, with its config.json."""
    shutil.rmtree(
        run.folder, ignore_errors=True
    )  # of a launch that was killed; SQLite gives its number out again
    run.folder.mkdir(parents=True)
    places = {
        "model": str(run.base_model.folder),
        "model_name": run.base_model.name,
        "train_data": str(run.data.file("train")),
        "heldout_data": str(run.data.file("heldout")),
    }
    (run.folder / "config.json").write_text(json.dumps(config.to_dict() | places, indent=1))


def team_of(user: User, data: DatasetVersion) -> Team | None:
    """A run belongs to the team of its data: whoever sees the one sees the other, and may delete
    both.

    Raises:
        NotAllowed: the person only views that team.
    """
    team = data.dataset.team
    if team is None or user.is_superuser or data.dataset.owner_id == user.pk:
        return team
    if not user.memberships.filter(team=team).exclude(role=Role.VIEWER).exists():
        raise NotAllowed(
            f"You only view what team {team} has; ask a lead to make you a member to train on its "
            "data.",
            field="data",
        )
    return team


def settings_of(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in OWN_SETTINGS}
