"""Resume a run that ran out of memory with an option that uses less (forecast/memory_options.py):
when a user chooses one, or automatically with `auto_reduce_memory`.
"""

from __future__ import annotations

import json
from typing import Any

from django.db import transaction
from django.db.models import F

from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.outcome import RESULT_FILE
from training.errors import Conflict, UserError
from training.people.models import User
from training.runs import actions
from training.runs.forecast.memory_estimators import CannotEstimate, get_estimator
from training.runs.forecast.memory_options import (
    MemoryOption,
    build_changed_config,
    list_memory_options,
)
from training.runs.forecast.target_device import get_target_device
from training.runs.forecast.token_lengths import get_run_lengths
from training.runs.launch import services
from training.runs.models import Run
from training.runs.states import State

AUTOMATIC_OPTIONS = ("halve", "checkpointing")  # those that do not change the result


def list_recovery_options(run: Run) -> list[MemoryOption]:
    """The memory options of a run, with the forecasts that are cached."""
    config = RunConfig.from_dict(run.config)
    lengths = get_run_lengths(run.data, run.base_model, config)
    return list_memory_options(config, run.base_model, lengths, get_target_device(run.pool))


def forecast_next_option(run: Run) -> None:
    """Create the memory estimator of the first option without a forecast (takes seconds).

    Raises:
        UserError: the simulation failed.
    """
    option = next((one for one in list_recovery_options(run) if one.memory is None), None)
    if option is None:
        return
    try:
        get_estimator(
            run.base_model.folder,
            build_changed_config(RunConfig.from_dict(run.config), option.changes),
            get_target_device(run.pool).kind,
        )
    except CannotEstimate:
        pass  # the error is cached, and the run does not have this option


def apply_memory_option(user: User, run: Run, name: str) -> Run:
    """Change the run's settings by one memory option and queue it again from its last checkpoint.

    Raises:
        UserError: the run has no such option.
        Conflict, NotAllowed: see `continue_run`.
    """
    # The row is locked until both changes are done; config.json is written last, when no check can
    # fail anymore.
    with transaction.atomic():
        locked_run = (
            Run.objects.select_for_update(of=("self",))
            .select_related("base_model", "data__dataset", "owner", "team")
            .get(pk=run.pk)
        )
        option = get_memory_option(locked_run, name)
        queued = actions.continue_run(user, locked_run)
        apply_settings(
            queued,
            build_changed_config(RunConfig.from_dict(queued.config), option.changes),
            option.memory,
        )
        return queued


def get_memory_option(run: Run, name: str) -> MemoryOption:
    """Raises UserError: the run has no such option; Conflict: it has not ended."""
    if run.state not in (State.FAILED, State.STOPPED):
        raise Conflict(
            f"{run.name} is {run.get_state_display().lower()}. Only a stopped or failed run can be "
            "changed."
        )
    option = next((one for one in list_recovery_options(run) if one.name == name), None)
    if option is None:
        raise UserError(
            f"{run.name} has no memory option {name[:40]!r}. Choose one that its page lists.",
            field="option",
            code="no_memory_option",
        )
    return option


def apply_settings(run: Run, config: RunConfig, memory: dict[str, Any] | None) -> None:
    """Write changed settings to the run's row and its config.json."""
    settings = services.get_public_settings(config)
    Run.objects.filter(pk=run.pk).update(
        config=settings, method=config.method, forecast=memory or {}, revision=F("revision") + 1
    )
    path = run.folder / "config.json"
    internal_settings = {
        name: value
        for name, value in json.loads(path.read_text()).items()
        if name in services.INTERNAL_SETTINGS
    }
    write_atomically(path, json.dumps(config.to_dict() | internal_settings, indent=1))
    run.refresh_from_db()


def recover_run(run: Run) -> str:
    """Change a run that ran out of memory so that it needs less, and return a message that says
    how; empty if that is not possible. Called by the supervisor.
    """
    if not run.config.get("auto_reduce_memory"):
        return ""
    option = next(
        (one for one in list_recovery_options(run) if one.name in AUTOMATIC_OPTIONS), None
    )
    if option is None:
        return ""
    apply_settings(
        run, build_changed_config(RunConfig.from_dict(run.config), option.changes), option.memory
    )
    (run.folder / RESULT_FILE).unlink(missing_ok=True)
    changes = ", ".join(f"{name} {str(value).lower()}" for name, value in option.changes.items())
    return f"Resuming from the last checkpoint with {changes}."
