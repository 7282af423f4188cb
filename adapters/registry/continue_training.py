"""Continue from a version: a run that begins with its weights, with the settings that made it but
for those that are changed.
"""

from __future__ import annotations

import json
from typing import Any

from django.db import transaction

from adapters.models import AdapterVersion
from training.datasets.models import DatasetVersion
from training.datasets.visible import visible_data
from training.engine.file_names import ADAPTER
from training.engine.files import write_atomically
from training.errors import ConfigError, Conflict, NotFound, UserError
from training.people.models import User
from training.runs.launch.services import launch_run
from training.runs.models import Run

# What the weights were made in the shape of; another would be another adapter.
SHAPE = (
    "method",
    "rank",
    "alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "rslora",
    "dora",
    "virtual_tokens",
    "prefix_projection",
    "bottleneck_size",
    "activation",
    "placement",
)
IN_FILE = (("rank", "r"), ("alpha", "lora_alpha"), ("rslora", "use_rslora"), ("dora", "use_dora"))
# What was meant for a beginning: weights that are there need no start, and trials would not begin
# with them.
BEGINNING = (
    "init_weights",
    "prompt_init",
    "prompt_text",
    "tune_share",
    "tune_minutes",
    "tune_over",
)


def settings_to_go_on(version: AdapterVersion) -> dict[str, Any]:
    """The settings that a run from this version begins with."""
    kept = {
        name: value
        for name, value in version.record.get("settings", {}).items()
        if name not in BEGINNING
    }
    return {**kept, "method": version.method, **shape_of(version)}


def shape_of(version: AdapterVersion) -> dict[str, Any]:
    """Rank and alpha as the files have them: PiSSA's and OLoRA's are saved at twice the rank."""
    if version.method not in ("lora", "qlora"):
        return {}
    told = json.loads((version.folder / ADAPTER[1]).read_text())
    shape = {name: told[key] for name, key in IN_FILE if key in told}
    modules = told.get("target_modules")
    return {
        **shape,
        **(
            {"target_modules": ",".join(sorted(modules))}
            if isinstance(modules, list) and not version.record.get("settings")
            else {}
        ),
    }


def refuse_trials(given: dict[str, Any]) -> None:
    """Raises ConfigError: trials are asked for, which begin anew each."""
    for field in ("tune_share", "tune_minutes"):
        if given.get(field):
            raise ConfigError(
                f"{field} is {given[field]!r}: trials could not go on with these weights; leave "
                "it out.",
                field=field,
            )


def continue_from(
    user: User,
    version: AdapterVersion,
    *,
    data: DatasetVersion | None = None,
    changes: dict[str, Any] | None = None,
    name: str = "",
) -> Run:
    """Launch a run that begins with a version's weights, on its own data unless another is given.

    Raises:
        Conflict: its data is gone. NotFound: it is not theirs to see. ConfigError: a change of what
            the weights are shaped like, or a setting that is wrong; whatever a launch refuses.
    """
    given = changes or {}
    settings = settings_to_go_on(version)
    for field in SHAPE:
        if field in given and given[field] != settings.get(field, given[field]):
            raise ConfigError(
                f"{field} is {given[field]!r}, and the version's weights have "
                f"{settings.get(field)!r}; leave it as it is.",
                field=field,
            )
    refuse_trials(given)
    chosen = data or version.data
    if chosen is None:
        raise Conflict(
            "The data of this version is deleted; choose other data to go on with.", field="data"
        )
    if visible_data(user, chosen.pk) is None:
        raise NotFound(
            "The data of this version is not shared with you; choose other data to go on with.",
            field="data",
        )
    if not version.folder.is_dir():
        raise UserError("The files of this version are gone.")
    with transaction.atomic():  # no worker hears of it before its folder says where it begins
        run = launch_run(
            user,
            base_model=version.base_model,
            data=chosen,
            settings={**settings, **given},
            name=name or version.name,
        )
        run.from_version = version.pk
        run.save(update_fields=["from_version"])
        place = run.folder / "config.json"
        write_atomically(
            place,
            json.dumps(
                {**json.loads(place.read_text()), "start_weights": str(version.folder)}, indent=1
            ),
        )
    return run
