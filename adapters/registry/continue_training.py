"""Continue training: start a run from a version's weights with its settings, some of
them changed.
"""

from __future__ import annotations

import json
from typing import Any

from adapters.models import AdapterVersion
from training.datasets.models import DatasetVersion
from training.datasets.permissions import find_visible_version
from training.engine.file_names import ADAPTER_FILES
from training.errors import ConfigError, Conflict, NotFound
from training.people.models import User
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.launch.start_version import StartVersion, get_start_version
from training.runs.models import Run

# Settings that fix the shape of the weights. Changing one would make a different adapter.
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
# Settings for new weights. A run from a version needs no initialization, and tuning trials would
# not start from its weights.
INIT_SETTINGS = (
    "init_lora_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tuning_budget_fraction",
    "tuning_budget_minutes",
    "tuning_search_space",
)


def get_inherited_settings(version: AdapterVersion) -> dict[str, Any]:
    """The settings that a run takes over from the version it starts from."""
    inherited = {
        name: value
        for name, value in version.provenance.get("settings", {}).items()
        if name not in INIT_SETTINGS
    }
    return {**inherited, "method": version.method, **read_shape_settings(version)}


def read_shape_settings(version: AdapterVersion) -> dict[str, Any]:
    """Rank and alpha from the adapter's files: PEFT saves PiSSA and OLoRA with twice the rank."""
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


def build_start_version(version: AdapterVersion) -> StartVersion:
    settings = get_inherited_settings(version)
    return StartVersion(
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


def resolve_start_version(
    user: User, *, version: int | None, name: str, number: int | None, sha256: str
) -> StartVersion:
    """Find a version by ID, or as a YAML file names it: by the hash of its weights, else by name
    and number.

    Raises:
        NotFound: the user sees no such version, or its files are missing.
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
            f"Start adapter {requested} not found. Remove it to start from the base model.",
            field="start_version",
        )
    return build_start_version(source)


def continue_from(
    user: User,
    version: AdapterVersion,
    *,
    data: DatasetVersion | None = None,
    changes: dict[str, Any] | None = None,
    name: str = "",
) -> Run:
    """Launch a run that starts from a version's weights, on the version's own data unless `data` is
    set.

    Raises:
        Conflict: the version's data was deleted.
        NotFound: the user may not see the data, or the version's files are missing.
        ConfigError: a changed setting contradicts the shape of the weights or is invalid.
    """
    for field, value in (changes or {}).items():
        if isinstance(value, list):
            raise ConfigError(f"{field} has several values; a single run takes one.", field=field)
    training_data = data or version.data
    if training_data is None:
        raise Conflict("The data of this version was deleted. Choose other data.", field="data")
    if find_visible_version(user, training_data.pk) is None:
        raise NotFound(
            "The data of this version is not shared with you. Choose other data.",
            field="data",
        )
    request = LaunchRequest(
        user=user,
        base_model=version.base_model,
        data=training_data,
        settings=get_inherited_settings(version) | (changes or {}),
        name=name or version.name,
        start_version=get_start_version(user, version.pk),
    )
    run = launch_runs(request, accept_warnings=True)
    assert isinstance(run, Run)
    return run
