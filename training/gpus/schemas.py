"""API schemas of devices, pools, quotas, usage and the audit log."""

from datetime import datetime
from typing import Annotated, Any

from ninja import Schema
from pydantic import ConfigDict, Field

from training.gpus import devices, quotas, usage
from training.gpus.models import AuditEntry, Device
from training.people.disk_quota import DiskUsage, StoredItem
from training.people.models import Team

NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
SmallCount = Annotated[int, Field(ge=0, le=1_000_000)]


class DeviceOut(Schema):
    id: int
    host: str
    index: int
    uuid: str
    name: str
    pool_id: int
    total_bytes: int
    used_bytes: int
    utilization: float | None
    temperature: float | None
    power_watts: float | None
    condition: str
    is_offline: bool = Field(description="The host has not reported for 30 s.")

    @staticmethod
    def resolve_host(row: Device) -> str:
        return row.host.name

    @staticmethod
    def resolve_is_offline(row: Device) -> bool:
        return devices.is_offline(row.host)


class PoolOut(Schema):
    id: int
    name: str
    kind: str
    runs_per_device: int
    min_run_seconds: int
    is_on_hold: bool


class PoolChangeIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"runs_per_device": 2}]}
    )
    name: str | None = Field(None, max_length=80)
    runs_per_device: int | None = Field(None, ge=1, le=4)
    min_run_seconds: SmallCount | None = None
    reason: str = Field("", max_length=300)


class QuotaIn(Schema):
    """A team's quota in a pool. Absent fields stay unchanged and null removes a limit.

    `team` is null for the users without a team.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"team": 1, "guaranteed": 2, "limit": 4}]}
    )
    team: NonNegativeInt | None
    guaranteed: SmallCount = 0
    limit: SmallCount | None = None
    weight: float = Field(1.0, gt=0, le=1000)
    hours_per_month: float | None = Field(None, gt=0, le=1e9)
    is_hard_budget: bool = False
    max_bytes: NonNegativeInt | None = None
    max_run_seconds: SmallCount | None = None
    reason: str = Field("", max_length=300)


class QuotaOut(Schema):
    team: str | None
    team_id: int | None
    guaranteed: int
    limit: int | None
    weight: float
    hours_per_month: float | None
    is_hard_budget: bool
    max_bytes: int | None
    max_run_seconds: int | None
    has_admin_hold: bool
    has_lead_hold: bool
    device_count: int
    borrowed: int
    hours_used: float


class HoldIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"is_on_hold": True, "is_pool_wide": True}]}
    )
    is_on_hold: bool
    drain: bool = False
    is_pool_wide: bool = False
    team: NonNegativeInt | None = None
    reason: str = Field("", max_length=300)


class PersonalQuotaIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"max_running": 2, "max_queued": 20}]}
    )
    max_running: SmallCount | None = None
    max_queued: SmallCount | None = None
    hours_per_month: float | None = Field(None, gt=0, le=1e9)
    is_hard_budget: bool = False
    reason: str = Field("", max_length=300)


class PersonalQuotaOut(Schema):
    max_running: int | None
    max_queued: int | None
    hours_per_month: float | None
    is_hard_budget: bool


class DiskQuotaIn(Schema):
    """null: the default."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"max_bytes": 10**11}]}
    )
    max_bytes: NonNegativeInt | None
    reason: str = Field("", max_length=300)


class DiskUsageOut(Schema):
    user: str | None
    team: str | None
    used: int
    quota: int | None = Field(description="Bytes; null: no limit.")
    by_kind: dict[str, int]

    @staticmethod
    def resolve_user(row: DiskUsage) -> str | None:
        return None if isinstance(row.holder, Team) else row.holder.username

    @staticmethod
    def resolve_team(row: DiskUsage) -> str | None:
        return row.holder.name if isinstance(row.holder, Team) else None


class StoredItemOut(Schema):
    kind: str
    name: str
    owner: str
    team: str
    bytes: int
    url: str
    in_use_reason: str = Field(description="Why it cannot be deleted now; empty if it can.")

    @staticmethod
    def resolve_kind(row: StoredItem) -> str:
        return row.kind.title


class DiskOut(Schema):
    usage: list[DiskUsageOut]
    items: list[StoredItemOut]


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
    action: str
    subject: str
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str
    digest: str

    @staticmethod
    def resolve_actor(row: AuditEntry) -> str:
        return row.actor_name


class ReasonIn(Schema):
    model_config = ConfigDict(extra="forbid")
    reason: str = Field("", max_length=300)


def to_quota_row(team_usage: usage.TeamUsage) -> dict[str, Any]:
    quota = team_usage.quota
    values = {
        name: getattr(quota, name)
        for name in (*quotas.TEAM_FIELDS, "has_admin_hold", "has_lead_hold", "team_id")
    }
    return values | {
        "team": team_usage.team.name if team_usage.team else None,
        "device_count": team_usage.device_count,
        "borrowed": team_usage.borrowed,
        "hours_used": team_usage.hours.used,
    }
