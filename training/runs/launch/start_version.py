"""The adapter version whose weights a run starts from. The runs app does not import `adapters`,
which registers a resolver that finds a version and checks its visibility.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.catalog.models import BaseModel
from training.engine.config import RunConfig
from training.errors import ConfigError, UserError, to_one_line
from training.people.models import User


@dataclass(frozen=True)
class StartVersion:
    """`fixed_settings` are settings of the weights that a run from them cannot change, e.g. the
    rank.
    """

    version: int
    name: str
    number: int
    sha256: str
    folder: Path
    base_model: int
    fixed_settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"

    def to_json(self) -> dict[str, Any]:
        """The reference that is stored with a run and in its YAML file."""
        return {"name": self.name, "version": self.number, "sha256": self.sha256}


class Resolver(Protocol):
    """Find a version by its id, or by the `name`, `number` and `sha256` of a YAML file.

    Raises NotFound: no such version is visible to the user, or its files are missing.
    """

    def __call__(
        self, user: User, *, version: int | None, name: str, number: int | None, sha256: str
    ) -> StartVersion: ...


_resolvers: list[Resolver] = []


def register_resolver(resolver: Resolver) -> None:
    _resolvers[:] = [resolver]


def get_start_version(user: User, version: int) -> StartVersion:
    """Raises NotFound: see `Resolver`."""
    return _resolvers[0](user, version=version, name="", number=None, sha256="")


def find_start_version(user: User, reference: Any) -> StartVersion:
    """The version that a YAML file refers to.

    Raises:
        UserError: the reference is not a mapping with a name.
        NotFound: see `Resolver`.
    """
    if not isinstance(reference, dict) or not reference.get("name"):
        raise UserError(
            "`start_version` must be a mapping with name, version and sha256.",
            field="start_version",
        )
    number = reference.get("version")
    if number is not None and type(number) is not int:
        raise UserError("`start_version.version` must be an integer.", field="start_version")
    return _resolvers[0](
        user,
        version=None,
        name=to_one_line(str(reference["name"])),
        number=number,
        sha256=to_one_line(str(reference.get("sha256") or "")),
    )


def is_same_setting(name: str, value: Any, fixed: Any) -> bool:
    """Whether both values mean the same. The order of target_modules does not matter."""
    if name == "target_modules":
        return {part.strip() for part in value.split(",")} == {
            part.strip() for part in fixed.split(",")
        }
    return bool(value == fixed)


def check_start_version(start: StartVersion, base_model: BaseModel, config: RunConfig) -> None:
    """Raises ConfigError: the base model or a setting does not match the weights."""
    if start.base_model != base_model.pk:
        raise ConfigError(
            f"{start} was trained on a different base model than {base_model.name}.", field="model"
        )
    for name, value in start.fixed_settings.items():
        if not is_same_setting(name, getattr(config, name), value):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, but the weights of {start} have {value!r}. "
                f"Use {value!r}.",
                field=name,
            )
    for name in ("tuning_budget_fraction", "tuning_budget_minutes"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, but a run from {start} cannot run trials. "
                f"Remove {name}.",
                field=name,
            )
    if config.init_lora_weights != "default":
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}, but the run starts from the weights "
            f"of {start}. Remove init_lora_weights.",
            field="init_lora_weights",
        )
