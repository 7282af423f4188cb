"""The shapes of devices, quotas, usage and audit in the API: what comes in is checked here, what
goes out is described.
"""

from datetime import datetime
from typing import Annotated, Any

from ninja import Schema
from pydantic import ConfigDict, Field

from training.gpus import devices, quotas, usage
from training.gpus.models import AuditEntry, Device

Whole = Annotated[int, Field(ge=0, le=2**53)]
Few = Annotated[int, Field(ge=0, le=1_000_000)]


class DeviceOut(Schema):
    id: int
    host: str
    index: int
    uuid: str
    name: str
    pool_id: int
    total_bytes: int
    used_bytes: int
    utilisation: float | None
    temperature: float | None
    power_watts: float | None
    condition: str
    gone: bool = Field(description="its host has not reported for 30 s")

    @staticmethod
    def resolve_host(row: Device) -> str:
        return row.host.name

    @staticmethod
    def resolve_gone(row: Device) -> bool:
        return devices.is_gone(row.host)


class PoolOut(Schema):
    id: int
    name: str
    kind: str
    runs_per_device: int
    shortest_seconds: int
    held: bool


class PoolChange(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"runs_per_device": 2}]}
    )
    name: str | None = Field(None, max_length=80)
    runs_per_device: int | None = Field(None, ge=1, le=4)
    shortest_seconds: Few | None = None
    reason: str = Field("", max_length=300)


class QuotaIn(Schema):
    """A team's part of a pool; absent fields stay, null lifts a limit. `team` null: whoever is in
    no team.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"team": 1, "guaranteed": 2, "limit": 4}]}
    )
    team: Whole | None
    guaranteed: Few = 0
    limit: Few | None = None
    weight: float = Field(1.0, gt=0, le=1000)
    hours_a_month: float | None = Field(None, gt=0, le=1e9)
    hard: bool = False
    most_bytes: Whole | None = None
    longest_seconds: Few | None = None
    reason: str = Field("", max_length=300)


class QuotaOut(Schema):
    team: str | None
    team_id: int | None
    guaranteed: int
    limit: int | None
    weight: float
    hours_a_month: float | None
    hard: bool
    most_bytes: int | None
    longest_seconds: int | None
    held: bool
    held_by_lead: bool
    holds: int
    borrowed: int
    hours_used: float


class HoldIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"held": True, "whole_pool": True}]}
    )
    held: bool
    drain: bool = False
    whole_pool: bool = False
    team: Whole | None = None
    reason: str = Field("", max_length=300)


class PersonIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"running": 2, "queued": 20}]}
    )
    running: Few | None = None
    queued: Few | None = None
    hours_a_month: float | None = Field(None, gt=0, le=1e9)
    hard: bool = False
    reason: str = Field("", max_length=300)


class PersonOut(Schema):
    running: int | None
    queued: int | None
    hours_a_month: float | None
    hard: bool


class UsageOut(Schema):
    team: str
    user: str
    pool: str
    runs: int
    seconds: float


class AuditOut(Schema):
    id: int
    at: datetime
    actor: str
    act: str
    subject: str
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str
    digest: str

    @staticmethod
    def resolve_actor(row: AuditEntry) -> str:
        return row.actor_name


class WhyIn(Schema):
    model_config = ConfigDict(extra="forbid")
    reason: str = Field("", max_length=300)


def as_row(line: usage.TeamLine) -> dict[str, Any]:
    quota = line.quota
    kept = {
        name: getattr(quota, name)
        for name in (*quotas.TEAM_FIELDS, "held", "held_by_lead", "team_id")
    }
    return kept | {
        "team": line.team.name if line.team else None,
        "holds": line.holds,
        "borrowed": line.borrowed,
        "hours_used": line.hours.used,
    }
