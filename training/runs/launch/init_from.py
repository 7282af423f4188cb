"""The adapter version whose weights a run begins with. Runs know no adapters: `adapters` registers
how one is found, and checks who may see it.
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
class StartWeights:
    """`fixed` are the settings that the weights were made with and that cannot change with them."""

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
        """What a run's row and its YAML file say of it."""
        return {"name": self.name, "version": self.number, "sha256": self.sha256}


class Resolver(Protocol):
    """Finds a version by its id, or by `name`, `number` and `sha256` as a YAML file has them.

    Raises NotFound: there is none that the person may see, or its files are gone.
    """

    def __call__(
        self, user: User, *, version: int | None, name: str, number: int | None, sha256: str
    ) -> StartWeights: ...


_resolvers: list[Resolver] = []


def register_resolver(resolver: Resolver) -> None:
    _resolvers[:] = [resolver]


def get_start_weights(user: User, version: int) -> StartWeights:
    """Raises NotFound: see `Resolver`."""
    return _resolvers[0](user, version=version, name="", number=None, sha256="")


def find_start_weights(user: User, described: Any) -> StartWeights:
    """The version that a YAML file names.

    Raises:
        UserError: not a mapping with a name. NotFound: see `Resolver`.
    """
    if not isinstance(described, dict) or not described.get("name"):
        raise UserError(
            "`start_from` must be a mapping with name, version and sha256.", field="start_from"
        )
    number = described.get("version")
    if number is not None and type(number) is not int:
        raise UserError("`start_from.version` must be a whole number.", field="start_from")
    return _resolvers[0](
        user,
        version=None,
        name=to_one_line(str(described["name"])),
        number=number,
        sha256=to_one_line(str(described.get("sha256") or "")),
    )


def is_same_setting(name: str, value: Any, fixed: Any) -> bool:
    """Names of modules may come in any order."""
    if name == "target_modules":
        return {part.strip() for part in value.split(",")} == {
            part.strip() for part in fixed.split(",")
        }
    return bool(value == fixed)


def check_start_weights(start: StartWeights, base_model: BaseModel, config: RunConfig) -> None:
    """Raises ConfigError: the settings or the base model are not those of the weights."""
    if start.base_model != base_model.pk:
        raise ConfigError(
            f"{start} was trained on another base model than {base_model.name}.", field="model"
        )
    for name, value in start.fixed_settings.items():
        if not is_same_setting(name, getattr(config, name), value):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, and the weights of {start} have {value!r}; "
                "leave it as it is.",
                field=name,
            )
    for name in ("tuning_budget_fraction", "tuning_budget_minutes"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}: trials could not go on with the weights of "
                f"{start}; leave it out.",
                field=name,
            )
    if config.init_lora_weights != "default":
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights}: a run from {start} begins with its weights; "
            "leave it out.",
            field="init_lora_weights",
        )
