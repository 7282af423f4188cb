"""API endpoints of devices, pools, quotas, usage and the audit log. Permissions are those of the
pages. The endpoints of the queue are in training/runs/queue.
"""

from typing import Annotated, Any

from ninja import Query, Router
from ninja.pagination import paginate

from training.errors import NotFound
from training.gpus import audit, quotas, usage
from training.gpus.audit_views import filter_audit_entries
from training.gpus.models import Device, PersonalQuota, Pool, Quota
from training.gpus.schemas import (
    AuditOut,
    DeviceOut,
    DiskOut,
    DiskQuotaIn,
    DiskUsageOut,
    HoldIn,
    PersonalQuotaIn,
    PersonalQuotaOut,
    PoolChangeIn,
    PoolOut,
    QuotaIn,
    QuotaOut,
    ReasonIn,
    UsageOut,
    to_quota_row,
)
from training.people import disk_quota
from training.people.pagination import Pagination
from training.people.permissions import check_admin
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.people.users import get_user_by_name

router = Router(tags=["gpus"])
MAX_LISTED_TEAMS = 50


@router.get("/devices", response=list[DeviceOut])
@paginate(Pagination)
def list_devices(request: AuthenticatedRequest) -> Any:
    return Device.objects.select_related("host")


@router.post("/devices/{int:device_id}/return", response=DeviceOut)
def return_to_service(request: AuthenticatedRequest, device_id: int, body: ReasonIn) -> Device:
    """Use a dirty device again although part of its memory is in use. Admins only."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    device = Device.objects.select_related("host").filter(pk=device_id).first()
    if device is None:
        raise NotFound(f"Device {device_id} does not exist.")
    quotas.return_to_service(request.user, device, body.reason)
    device.refresh_from_db()
    return device


@router.get("/pools", response=list[PoolOut])
@paginate(Pagination)
def list_pools(request: AuthenticatedRequest) -> Any:
    return Pool.objects.all()


@router.patch("/pools/{int:pool_id}", response=PoolOut)
def change_pool(request: AuthenticatedRequest, pool_id: int, body: PoolChangeIn) -> Pool:
    """Edit a pool. Running runs are not stopped. Admins only."""
    changes = {
        name: value for name, value in body.dict(exclude={"reason"}).items() if value is not None
    }
    return quotas.edit_pool(request.user, quotas.get_pool(pool_id), changes, body.reason)


@router.get("/pools/{int:pool_id}/quotas", response=list[QuotaOut])
@paginate(Pagination)
def list_quotas(request: AuthenticatedRequest, pool_id: int) -> list[dict[str, Any]]:
    """The quotas of all teams for admins, and of their own teams for leads."""
    quotas.check_lead_or_admin(request.user)
    pool = quotas.get_pool(pool_id)
    pairs = [(pool, team) for team in usage.list_quota_teams(request.user)]
    return [to_quota_row(team_usage) for team_usage in usage.list_team_usage(pairs)]


@router.put("/pools/{int:pool_id}/quotas", response=QuotaOut)
def set_quota(request: AuthenticatedRequest, pool_id: int, body: QuotaIn) -> dict[str, Any]:
    """Edit a team's quota. Running runs are not stopped. Admins only."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, body.team) if body.team is not None else None
    quotas.edit_quota(
        request.user,
        pool,
        team,
        body.dict(exclude={"team", "reason"}, exclude_unset=True),
        body.reason,
    )
    return to_quota_row(usage.get_team_usage(pool, team))


@router.post("/pools/{int:pool_id}/hold", response=PoolOut)
def set_hold(request: AuthenticatedRequest, pool_id: int, body: HoldIn) -> Pool:
    """Stop new runs of a team, or of the whole pool, from starting, or lift that hold.

    With `drain`, running runs also save a checkpoint and wait. Leads can hold their own team only.
    """
    quotas.check_lead_or_admin(request.user)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, body.team) if body.team is not None else None
    target: Pool | Quota = pool if body.is_pool_wide else quotas.get_quota(pool, team)
    quotas.set_hold(
        request.user, target, is_on_hold=body.is_on_hold, drain=body.drain, reason=body.reason
    )
    return quotas.get_pool(pool_id)


@router.get("/people/{username}/quota", response=PersonalQuotaOut)
def read_personal_quota(request: AuthenticatedRequest, username: str) -> PersonalQuota:
    """A user's limits. By default there are none. Admins only."""
    check_admin(request.user, "read a user's limits")
    return PersonalQuota.objects.filter(user=get_user_by_name(username)).first() or PersonalQuota()


@router.put("/people/{username}/quota", response=PersonalQuotaOut)
def set_personal_quota(
    request: AuthenticatedRequest, username: str, body: PersonalQuotaIn
) -> PersonalQuota:
    """Edit a user's limits. Admins only."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    return quotas.edit_personal_quota(
        request.user,
        get_user_by_name(username),
        body.dict(exclude={"reason"}, exclude_unset=True),
        body.reason,
    )


@router.get("/disk", response=DiskOut)
def read_disk_usage(request: AuthenticatedRequest) -> Any:
    """Disk usage and quotas of you and your first 50 teams, and the largest items that you may
    see.
    """
    teams = request.user.teams.order_by("name")[:MAX_LISTED_TEAMS]
    return {
        "usage": disk_quota.list_disk_usages([request.user, *teams]),
        "items": disk_quota.list_items(request.user),
    }


@router.put("/people/{username}/disk-quota", response=DiskUsageOut)
def set_user_disk_quota(
    request: AuthenticatedRequest, username: str, body: DiskQuotaIn
) -> disk_quota.DiskUsage:
    """Edit a user's disk quota. Nothing is deleted. Admins only."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    user = get_user_by_name(username)
    quotas.edit_disk_quota(request.user, user, body.max_bytes, body.reason)
    return disk_quota.get_disk_usage(user)


@router.put("/teams/{int:team_id}/disk-quota", response=DiskUsageOut)
def set_team_disk_quota(
    request: AuthenticatedRequest, team_id: int, body: DiskQuotaIn
) -> disk_quota.DiskUsage:
    """Edit a team's disk quota. Nothing is deleted. Admins only."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    team = get_team(request.user, team_id)
    quotas.edit_disk_quota(request.user, team, body.max_bytes, body.reason)
    return disk_quota.get_disk_usage(team)


@router.get("/usage", response=list[UsageOut])
@paginate(Pagination)
def read_usage(
    request: AuthenticatedRequest, month: Annotated[str, Query(max_length=7)] = ""
) -> Any:
    """Device-seconds of a month such as 2026-11, by team, user and pool.

    Leads see their own teams.
    """
    quotas.check_lead_or_admin(request.user)
    return usage.list_report_rows(request.user, usage.parse_month(month))


@router.get("/audit", response=list[AuditOut])
@paginate(Pagination)
def list_audit(
    request: AuthenticatedRequest,
    action: Annotated[str, Query(max_length=30)] = "",
    q: Annotated[str, Query(max_length=100)] = "",
) -> Any:
    """The audit log, newest first. Leads see the entries of their own teams."""
    return filter_audit_entries(request.user, action, q)


@router.get("/audit/intact", response=dict[str, int | None])
def verify_audit(request: AuthenticatedRequest) -> dict[str, int | None]:
    """The id of the first altered entry, or null if the log is intact. Admins only."""
    check_admin(request.user, "verify the audit log")
    tampered_entry = audit.find_tampered_entry()
    return {"first_altered_id": tampered_entry.pk if tampered_entry else None}
