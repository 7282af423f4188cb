"""Checks of every launch, and the run directory that the engine reads. No torch and no HTTP
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
from training.errors import Conflict, NotAllowed, UserError, find_storage_error
from training.people.models import Role, Team, User
from training.runs.models import Run

# Settings that a launch cannot set. They are paths and names that SnapML fills in.
INTERNAL_SETTINGS = frozenset({"model", "model_name", "train_data", "eval_data", "init_from"})


class WarningsNotAccepted(UserError):
    """The settings are valid but probably not intended. The launch starts once the warnings are
    accepted.
    """

    status = 409

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(
            " ".join(warnings) + " Accept the warnings to start anyway.", field="accept_warnings"
        )
        self.warnings = warnings


def read_settings(settings: dict[str, Any]) -> RunConfig:
    """Raises ConfigError: a setting is wrong; `field` names it. UserError: it is an internal
    setting.
    """
    forbidden = sorted(INTERNAL_SETTINGS & settings.keys())
    if forbidden:
        raise UserError(
            f"{forbidden[0]} is set by SnapML and cannot be changed.",
            field=forbidden[0],
            code="internal_setting",
        )
    return RunConfig.from_dict(settings)


def check_model_ready(model: BaseModel) -> None:
    """Raises Conflict: the model is not ready."""
    if model.state != ModelState.READY:
        raise Conflict(
            f"{model.name} is not ready yet ({model.get_state_display().lower()}).",
            field="model",
            code="model_not_ready",
        )


def prepare_run_dir(run: Run, config: RunConfig, init_from: Path | None) -> None:
    """Create the run directory with the config.json that the engine reads.

    Raises:
        StorageError: the disk is full or read-only.
        Conflict: it cannot be written for another reason.
    """
    paths = {
        "model": str(run.base_model.folder),
        "model_name": run.base_model.name,
        "train_data": str(run.data.split_path("train")),
        "eval_data": str(run.data.split_path("eval")),
        "init_from": str(init_from or ""),
    }
    try:
        # A killed launch may have left a folder, because SQLite reuses the id of its row.
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").write_text(json.dumps(config.to_dict() | paths, indent=1))
    except OSError as error:
        raise find_storage_error(error) or Conflict(
            f"The run's folder cannot be written ({error.strerror}). Ask an admin to make it "
            "writable.",
            code="folder_not_writable",
        ) from error


def get_run_team(user: User, data: DatasetVersion) -> Team | None:
    """The team of the data, which also owns the run. The same users can then see and delete both.

    Raises:
        NotAllowed: the user is only a viewer of that team.
    """
    team = data.dataset.team
    if team is None or user.is_superuser or data.dataset.owner_id == user.pk:
        return team
    if not user.memberships.filter(team=team).exclude(role=Role.VIEWER).exists():
        raise NotAllowed(
            f"You are only a viewer of team {team}. Ask a lead to make you a member to train on "
            "its data.",
            field="data",
        )
    return team


def get_public_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of the config that a launch can set."""
    return {
        name: value for name, value in config.to_dict().items() if name not in INTERNAL_SETTINGS
    }
