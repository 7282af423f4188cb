"""Continue from a version: a run that begins with its weights, with the settings that made it but
for those that are changed.
"""

from __future__ import annotations

import json
from typing import Any

from adapters.models import AdapterVersion
from training.datasets.models import DatasetVersion
from training.datasets.permissions import get_visible_version
from training.engine.file_names import ADAPTER_FILES
from training.errors import ConfigError, Conflict, NotFound
from training.people.models import User
from training.runs.launch.init_from import StartWeights, get_start_weights
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.models import Run

# What the weights were made in the shape of; another would be another adapter.
SHAPE_SETTINGS = (
    "method",
    "rank",
    "alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "num_virtual_tokens",
    "prefix_projection",
    "bottleneck_size",
    "activation",
    "adapter_placement",
)
PEFT_CONFIG_KEYS = (
    ("rank", "r"),
    ("alpha", "lora_alpha"),
    ("use_rslora", "use_rslora"),
    ("use_dora", "use_dora"),
)
# What was meant for a beginning: weights that are there need no start, and trials would not begin
# with them.
INIT_SETTINGS = (
    "init_lora_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tuning_budget_fraction",
    "tuning_budget_minutes",
    "tuning_search_space",
)


def get_inherited_settings(version: AdapterVersion) -> dict[str, Any]:
    """The settings that a run from this version begins with."""
    inherited = {
        name: value
        for name, value in version.provenance.get("settings", {}).items()
        if name not in INIT_SETTINGS
    }
    return {**inherited, "method": version.method, **read_shape_settings(version)}


def read_shape_settings(version: AdapterVersion) -> dict[str, Any]:
    """Rank and alpha as the files have them: PiSSA's and OLoRA's are saved at twice the rank."""
    if version.method not in ("lora", "qlora"):
        return {}
    peft_config = json.loads((version.folder / ADAPTER_FILES[1]).read_text())
    shape = {name: peft_config[key] for name, key in PEFT_CONFIG_KEYS if key in peft_config}
    modules = peft_config.get("target_modules")
    return {
        **shape,
        **(
            {"target_modules": ",".join(sorted(modules))}
            if isinstance(modules, list) and not version.provenance.get("settings")
            else {}
        ),
    }


def build_start_weights(version: AdapterVersion) -> StartWeights:
    settings = get_inherited_settings(version)
    return StartWeights(
        version=version.pk,
        name=version.name,
        number=version.number,
        sha256=version.sha256,
        folder=version.folder,
        base_model=version.base_model_id,
        fixed_settings={name: settings[name] for name in SHAPE_SETTINGS if name in settings},
    )


def has_config(version: AdapterVersion) -> bool:
    return version.is_full_model or (version.folder / ADAPTER_FILES[1]).is_file()


def resolve_start_weights(
    user: User, *, version: int | None, name: str, number: int | None, sha256: str
) -> StartWeights:
    """The version by its id, or as a YAML file names it: by its weights, else by name and number.

    Raises:
        NotFound: there is none that the person may see, or its files are gone.
    """
    visible = AdapterVersion.objects.visible_to(user).order_by("-pk")
    if version is not None:
        source = visible.filter(pk=version).first()
        requested = f"version {version}"
    else:
        same_name = (
            visible.filter(name=name)
            if number is None
            else visible.filter(name=name, number=number)
        )
        if sha256:
            same_weights = visible.filter(sha256=sha256)
            source = same_weights.filter(pk__in=same_name).first() or same_weights.first()
        else:
            source = same_name.first()
        requested = f"{name[:80]!r}" + ("" if number is None else f", version {number}")
    if source is None or not (source.folder.is_dir() and has_config(source)):
        raise NotFound(
            f"The adapter that this run begins with, {requested}, is not there, or not yours to see. "
            "Leave it out to begin with the base model.",
            field="from_version" if version is not None else "start_from",
        )
    return build_start_weights(source)


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
        Conflict: its data is gone. NotFound: it is not theirs to see, or the files are gone.
        ConfigError: a change of what the weights are shaped like, or a setting that is wrong;
            whatever a launch refuses.
    """
    for field, value in (changes or {}).items():
        if isinstance(value, list):
            raise ConfigError(f"{field} has several values; a run has one of each.", field=field)
    training_data = data or version.data
    if training_data is None:
        raise Conflict(
            "The data of this version is deleted; choose other data to go on with.", field="data"
        )
    if get_visible_version(user, training_data.pk) is None:
        raise NotFound(
            "The data of this version is not shared with you; choose other data to go on with.",
            field="data",
        )
    request = LaunchRequest(
        user=user,
        base_model=version.base_model,
        data=training_data,
        settings=get_inherited_settings(version) | (changes or {}),
        name=name or version.name,
        start_weights=get_start_weights(user, version.pk),
    )
    run = launch_runs(request, accept_warnings=True)
    assert isinstance(run, Run)
    return run
