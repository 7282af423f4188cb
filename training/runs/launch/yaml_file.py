"""Write a run as a YAML file (names of model and data, all settings) and read it back as a launch
request. No HTTP here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

from django.conf import settings

from training.catalog.models import BaseModel
from training.child_process import GIB, ProgramLimits, build_error, read_messages, run_child
from training.datasets.models import Dataset, DatasetVersion
from training.errors import NotFound, TooLarge, UserError, to_one_line
from training.gpus.models import Pool
from training.people.current_user import hold_program_slot
from training.people.models import User
from training.runs.forecast.target_device import get_default_pool
from training.runs.launch.auto import AutoRequest
from training.runs.launch.request import LaunchRequest
from training.runs.launch.start_version import find_start_version
from training.runs.launch.yaml_reader import MAX_CHARACTERS, dump_yaml
from training.runs.models import Run
from training.runs.queue.placement import Placement
from training.runs.states import Priority

TIMEOUT_SECONDS = 20.0
LIMITS = ProgramLimits(address_space_bytes=GIB // 2, counted_bytes=GIB // 2, cpu_seconds=5)
YAML_PROGRAM = "training.runs.launch.yaml_reader"
KEYS = (
    "name",
    "model",
    "data",
    "pool",
    "priority",
    "start_version",
    "settings",
    "auto",
    "skip_impossible",
    "request",
)
REQUEST_KEYS = ("name", "settings", "auto", "skip_impossible")


def to_yaml(run: Run) -> str:
    """The run as YAML: its resolved settings, which launch the same run, and its request, which can
    be planned again or launch the whole sweep. The data is identified by its digest.
    """
    request = dict(run.request)
    start = request.pop("start_version", None)
    document = {
        "name": run.name,
        "model": run.base_model.name,
        "data": {
            "name": run.data.dataset.name,
            "version": run.data.number,
            "sha256": run.data.digest,
        },
        # Left out for the default pool, since other installations have other pools.
        **({"pool": run.pool.name} if run.pool and run.pool != get_default_pool() else {}),
        **({"priority": run.priority} if run.priority != Priority.NORMAL else {}),
        **({"start_version": start} if start else {}),
        "settings": run.config,
    }
    text = dump_yaml(document)
    if is_plannable(request):
        with_request = dump_yaml(document | {"request": request})
        if len(with_request) <= MAX_CHARACTERS:  # a longer file could not be read back
            return with_request
    return text


def is_plannable(request: Mapping[str, Any]) -> bool:
    """Whether the request contains more than the run's settings: a plan's goal and locks, or a
    sweep's values.
    """
    return "auto" in request or "settings" in request


def load_yaml_in_child(text: str) -> Any:
    """The value of a YAML text, which a child program loads: PyYAML takes seconds for 64 kB."""
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"The file has more than {MAX_CHARACTERS:,} characters.", field="file")
    try:
        with hold_program_slot(LIMITS.counted_bytes):
            result = run_child(
                YAML_PROGRAM,
                cwd=settings.BASE_DIR,
                seconds=TIMEOUT_SECONDS,
                limits=LIMITS,
                stdin=text,
            )
    except subprocess.TimeoutExpired as error:
        raise UserError("Reading the file takes too long.", field="file") from error
    for message in read_messages(result.stdout):
        if "error" in message:
            raise build_error(message)
        return message["value"]
    raise UserError("Reading the file takes too much time or memory.", field="file")


def read_yaml(text: str) -> dict[str, Any]:
    """The file as a mapping with `model`, `data` and `settings`.

    Raises:
        UserError: see `load_yaml`; or it is not of this form.
        TooLarge: longer than MAX_CHARACTERS.
        SlotsBusy: too many programs run on this host.
    """
    value = load_yaml_in_child(text)
    if not isinstance(value, dict):
        raise UserError(
            f"The file must be a mapping with the keys {', '.join(KEYS)}.", field="file"
        )
    unknown = sorted(str(key) for key in set(value) - set(KEYS))
    if unknown:
        raise UserError(
            f"Unknown key {unknown[0][:40]!r}. Valid keys are {', '.join(KEYS)}.", field="file"
        )
    request = value.get("request")
    if request is not None:
        if not isinstance(request, dict) or not set(request) <= set(REQUEST_KEYS):
            raise UserError(
                f"`request` must be a mapping with the keys {', '.join(REQUEST_KEYS)}.",
                field="file",
            )
        check_auto_alone(request)
        value["request"] = parse_settings(request) | {
            "name": to_one_line(str(request.get("name") or ""))
        }
    check_auto_alone(value)
    name = to_one_line(str(value.get("name") or ""))
    return {**value, **parse_settings(value), "name": name}


def check_auto_alone(document: Mapping[str, Any]) -> None:
    """Raises UserError: both `auto` and `settings` are set."""
    if document.get("auto") is not None and document.get("settings"):
        raise UserError(
            "The file has both `auto` and `settings`. Remove one of them.", field="file"
        )


def parse_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, `auto` and `skip_impossible`.

    Raises:
        UserError: one of them has the wrong type.
    """
    settings = document.get("settings") or {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError("`settings` must be a mapping of names to values.", field="file")
    skip = document.get("skip_impossible") or False
    if not isinstance(skip, bool):
        raise UserError("`skip_impossible` must be true or false.", field="file")
    auto = document.get("auto")
    if auto is None:
        return {"settings": settings, "skip_impossible": skip}
    if not isinstance(auto, dict) or not set(auto) <= {"goal", "locked"}:
        raise UserError("`auto` must be a mapping with goal and locked.", field="file")
    locked = auto.get("locked") or {}
    if not isinstance(locked, dict) or not all(isinstance(key, str) for key in locked):
        raise UserError("`auto.locked` must be a mapping of names to values.", field="file")
    auto_fields = {"goal": str(auto.get("goal") or AutoRequest().goal)}
    return {
        "settings": settings,
        "skip_impossible": skip,
        "auto": {**auto_fields, "locked": locked},
    }


def to_launch_request(
    user: User, document: dict[str, Any], *, again: bool = False
) -> LaunchRequest:
    """The launch request of a file. `again` uses its `request` (plan again, or launch the whole
    sweep) instead of its settings.

    Raises:
        NotFound: the model, data, pool or adapter version does not exist.
        UserError: with `again`, the file has no request.
    """
    request = document.get("request")
    launch_fields = document
    if again:
        if request is None or not (request["settings"] or "auto" in request):
            raise UserError("The file has no `request` to repeat.", field="file")
        launch_fields = {**request, "name": request["name"] or document["name"]}
    start = document.get("start_version")
    auto = launch_fields.get("auto")
    return LaunchRequest(
        user=user,
        base_model=find_model(document),
        data=find_data(user, document),
        settings={} if auto is not None else launch_fields["settings"],
        auto=None if auto is None else AutoRequest(auto["goal"], auto["locked"]),
        name=launch_fields["name"],
        placement=find_placement(document),
        start_version=None if start is None else find_start_version(user, start),
        skip_impossible=launch_fields["skip_impossible"],
    )


def find_model(document: dict[str, Any]) -> BaseModel:
    """Raises NotFound: there is no model of this name. UserError: the file has no model."""
    if not document.get("model"):
        raise UserError("The file has no `model`, the name of a base model.", field="model")
    name = to_one_line(str(document["model"]))
    model = BaseModel.objects.filter(name=name).first()
    if model is None:
        known_names = ", ".join(BaseModel.objects.values_list("name", flat=True)[:10]) or "none yet"
        raise NotFound(
            f"Base model {name[:80]!r} not found. Available: {known_names}.", field="model"
        )
    return model


def find_data(user: User, document: dict[str, Any]) -> DatasetVersion:
    """The version by the digest of its content if the file has one, else by name and version number
    (default: the newest).

    Raises:
        NotFound: no such version is visible to the user.
    """
    reference = document.get("data")
    reference = reference if isinstance(reference, dict) else {"name": reference}
    visible_versions = DatasetVersion.objects.filter(
        dataset__in=Dataset.objects.visible_to(user)
    ).select_related("dataset__team")
    if reference.get("sha256"):
        rows = visible_versions.filter(digest=to_one_line(str(reference["sha256"])))
        same_name = rows.filter(dataset__name=to_one_line(str(reference.get("name"))))
        # Prefer the same name, but equal content under another name is the same data.
        rows = same_name if same_name.exists() else rows
    else:
        rows = visible_versions.filter(dataset__name=to_one_line(str(reference.get("name"))))
        if reference.get("version") is not None:
            number = reference["version"]
            rows = rows.filter(number=number if type(number) is int and 0 < number < 2**31 else 0)
    version = rows.order_by("-number").first()
    if version is None:
        raise NotFound(
            f"Data {str(reference.get('name'))[:80]!r} not found in the version that the file "
            "names.",
            field="data",
        )
    return version


def find_placement(document: dict[str, Any]) -> Placement:
    """The pool and priority of the file, or the defaults.

    Raises:
        NotFound: the pool does not exist. UserError: the priority is unknown.
    """
    pool, priority = None, document.get("priority") or Priority.NORMAL
    if document.get("pool") is not None:
        name = to_one_line(str(document["pool"]))
        pool = Pool.objects.filter(name=name).first()
        if pool is None:
            known_names = ", ".join(Pool.objects.values_list("name", flat=True)[:10]) or "none yet"
            raise NotFound(f"Pool {name[:80]!r} not found. Available: {known_names}.", field="pool")
    if priority not in Priority.values:
        raise UserError(f"priority must be one of {', '.join(Priority.values)}.", field="priority")
    return Placement(pool, priority)
