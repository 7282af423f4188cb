"""What every launch checks, and the folder that the engine is started on. No torch and no HTTP
here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.errors import Conflict, NotAllowed, UserError
from training.people.models import Role, Team, User
from training.runs.models import Run

# What the launch form may not say: the run's place on the disk is SnapML's business.
INTERNAL_SETTINGS = frozenset({"model", "model_name", "train_data", "eval_data", "start_weights"})


class WarningsNotAccepted(UserError):
    """Nothing is wrong, but something is seldom meant; the launch goes through once the warnings
    are accepted.
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
    forbidden = sorted(INTERNAL_SETTINGS & settings.keys())
    if forbidden:
        raise UserError(f"{forbidden[0]} is set by SnapML, not by the launch.", field=forbidden[0])
    return RunConfig.from_dict(settings)


def check_model_ready(model: BaseModel) -> None:
    """Raises Conflict: the model's weights are not there yet."""
    if model.state != ModelState.READY:
        raise Conflict(
            f"{model.name} is not ready yet ({model.get_state_display().lower()}).", field="model"
        )


def prepare_run_dir(run: Run, config: RunConfig, start_weights: Path | None) -> None:
    """Write the folder that the engine is started on, with its config.json."""
    # Left by a launch that was killed; SQLite gives its number out again.
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    paths = {
        "model": str(run.base_model.folder),
        "model_name": run.base_model.name,
        "train_data": str(run.data.split_path("train")),
        "eval_data": str(run.data.split_path("eval")),
        "start_weights": str(start_weights or ""),
    }
    (run.folder / "config.json").write_text(json.dumps(config.to_dict() | paths, indent=1))


def get_run_team(user: User, data: DatasetVersion) -> Team | None:
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


def get_public_settings(config: RunConfig) -> dict[str, Any]:
    return {
        name: value for name, value in config.to_dict().items() if name not in INTERNAL_SETTINGS
    }
