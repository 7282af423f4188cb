"""A run described as a file: YAML with the model's and the data's names and every setting. It knows
no request.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from training.catalog.models import BaseModel
from training.datasets.models import Dataset, DatasetVersion
from training.errors import NotFound, TooLarge, UserError, one_line
from training.gpus.models import Pool
from training.people.models import User
from training.runs.forecast.target_device import default_pool
from training.runs.models import Run
from training.runs.queue.placement import Where
from training.runs.states import Priority

MAX_CHARACTERS = 16_000
MOST_DEPTH = 20  # settings need three; every level costs PyYAML time that grows with the square
SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-3 is text to YAML 1.1
BEGINS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
KEYS = ("name", "model", "data", "pool", "priority", "settings", "auto")


def to_yaml(run: Run) -> str:
    """The whole config; `manage.py launch` and the launch page read it back. The digest holds the
    data to its version.
    """
    described = {
        "name": run.name,
        "model": run.base_model.name,
        "data": {
            "name": run.data.dataset.name,
            "version": run.data.number,
            "sha256": run.data.digest,
        },
        **(
            {"pool": run.pool.name} if run.pool and run.pool != default_pool() else {}
        ),  # another house has other names
        **({"priority": run.priority} if run.priority != Priority.NORMAL else {}),
        "settings": run.config,
    }
    return yaml.safe_dump(described, sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> dict[str, Any]:
    """The file as a mapping with `model`, `data` and `settings`.

    Raises:
        UserError: not YAML of this form; names the line or the key.
        TooLarge: longer than MAX_CHARACTERS.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"The file has more than {MAX_CHARACTERS:,} characters.", field="file")
    try:
        refuse_tricks(text)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"line {line}: not YAML: {error.problem}", field="file") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"The file is not YAML that can be read: {str(error)[:200]}", field="file"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"The file must be a mapping with {', '.join(KEYS)}.", field="file")
    unknown = sorted(str(key) for key in set(value) - set(KEYS))
    if unknown:
        raise UserError(
            f"There is no key {unknown[0][:40]!r}; known are {', '.join(KEYS)}.", field="file"
        )
    settings = value.get("settings") or {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError("`settings` must be a mapping of names to values.", field="file")
    auto = value.get("auto")
    if auto is not None and not (
        isinstance(auto, dict) and set(auto) <= {"goal", "locked"} and not settings
    ):
        raise UserError(
            "`auto` must be a mapping with goal and locked, and stand instead of `settings`.",
            field="file",
        )
    if auto and not isinstance(auto.get("locked") or {}, dict):
        raise UserError("`auto.locked` must be a mapping of names to values.", field="file")
    settings = {name: numeric(given) for name, given in settings.items()}
    return {**value, "settings": settings, "name": one_line(str(value.get("name") or ""))}


def refuse_tricks(text: str) -> None:
    """Raises UserError: aliases, or nesting that no run has."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise UserError(
                "The file uses YAML aliases (`*name`); write the values out.", field="file"
            )
        depth += isinstance(token, BEGINS) - isinstance(token, ENDS)
        if depth > MOST_DEPTH:
            raise UserError("The file is nested too deeply to describe a run.", field="file")


def numeric(given: Any) -> Any:
    if isinstance(given, list):
        return [numeric(one) for one in given]
    return float(given) if isinstance(given, str) and SCIENTIFIC.fullmatch(given) else given


def find_model(described: dict[str, Any]) -> BaseModel:
    """Raises NotFound: no such model in the catalog."""
    name = one_line(str(described.get("model")))
    model = BaseModel.objects.filter(name=name).first()
    if model is None:
        have = ", ".join(BaseModel.objects.values_list("name", flat=True)[:10]) or "none yet"
        raise NotFound(f"There is no base model {name[:80]!r}; there are {have}.", field="model")
    return model


def find_data(user: User, described: dict[str, Any]) -> DatasetVersion:
    """The version by its content if the file names that, else by name and number (the newest if no
    number is given).

    Raises:
        NotFound: none that the person may see.
    """
    wanted = described.get("data")
    wanted = wanted if isinstance(wanted, dict) else {"name": wanted}
    mine = DatasetVersion.objects.filter(
        dataset__in=Dataset.objects.visible_to(user)
    ).select_related("dataset__team")
    if wanted.get("sha256"):
        rows = mine.filter(digest=one_line(str(wanted["sha256"])))
        named = rows.filter(dataset__name=one_line(str(wanted.get("name"))))
        rows = (
            named if named.exists() else rows
        )  # the same content under another name is the same data
    else:
        rows = mine.filter(dataset__name=one_line(str(wanted.get("name"))))
        if wanted.get("version") is not None:
            number = wanted["version"]
            rows = rows.filter(
                number=number if isinstance(number, int) and 0 < number < 2**31 else 0
            )
    version = rows.order_by("-number").first()
    if version is None:
        raise NotFound(
            f"There is no data {str(wanted.get('name'))[:80]!r} that you may see in the version "
            "that the file names.",
            field="data",
        )
    return version


def find_where(described: dict[str, Any]) -> Where:
    """The devices and the class that the file names, or the usual ones.

    Raises:
        NotFound: no such pool. UserError: no such class.
    """
    pool, priority = None, described.get("priority") or Priority.NORMAL
    if described.get("pool") is not None:
        name = one_line(str(described["pool"]))
        pool = Pool.objects.filter(name=name).first()
        if pool is None:
            have = ", ".join(Pool.objects.values_list("name", flat=True)[:10]) or "none yet"
            raise NotFound(
                f"There is no pool of devices {name[:80]!r}; there are {have}.", field="pool"
            )
    if priority not in Priority.values:
        raise UserError(f"`priority` is one of {', '.join(Priority.values)}.", field="priority")
    return Where(pool, priority)
