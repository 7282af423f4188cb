"""Devices, pools, quotas, usage and audit in the API, with the permissions of the pages. The queue
is with the runs.
"""

from typing import Annotated, Any

from ninja import Query, Router
from ninja.pagination import paginate

from training.errors import NotFound
from training.gpus import audit, quotas, usage
from training.gpus.models import Device, PersonalQuota, Pool, Quota
from training.gpus.schemas import (
    AuditOut,
    DeviceOut,
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
from training.gpus.views import filter_audit_entries
from training.people.pagination import Pagination
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.people.users import get_user_by_name

router = Router(tags=["gpus"])


@router.get("/devices", response=list[DeviceOut])
@paginate(Pagination)
def list_devices(request: AuthenticatedRequest) -> Any:
    return Device.objects.select_related("host")


@router.post("/devices/{int:device_id}/offer", response=DeviceOut)
def return_to_service(request: AuthenticatedRequest, device_id: int, body: ReasonIn) -> Device:
    """Give a dirty device out again although memory is held there; admins only."""
    quotas.check_admin(request.user)
    device = Device.objects.select_related("host").filter(pk=device_id).first()
    if device is None:
        raise NotFound(f"There is no device {device_id}.")
    quotas.return_to_service(request.user, device, body.reason)
    device.refresh_from_db()
    return device


@router.get("/pools", response=list[PoolOut])
@paginate(Pagination)
def list_pools(request: AuthenticatedRequest) -> Any:
    return Pool.objects.all()


@router.patch("/pools/{int:pool_id}", response=PoolOut)
def change_pool(request: AuthenticatedRequest, pool_id: int, body: PoolChangeIn) -> Pool:
    """Admins only. An edit stops nothing that runs."""
    changes = {
        name: value for name, value in body.dict(exclude={"reason"}).items() if value is not None
    }
    return quotas.edit_pool(request.user, quotas.get_pool(pool_id), changes, body.reason)


@router.get("/pools/{int:pool_id}/quotas", response=list[QuotaOut])
def list_quotas(request: AuthenticatedRequest, pool_id: int) -> list[dict[str, Any]]:
    """Every team's part for admins, their own teams' for leads."""
    quotas.check_lead_or_admin(request.user)
    return [
        to_quota_row(team_usage)
        for team_usage in usage.list_team_usage(request.user, quotas.get_pool(pool_id))
    ]


@router.put("/pools/{int:pool_id}/quotas", response=QuotaOut)
def set_quota(request: AuthenticatedRequest, pool_id: int, body: QuotaIn) -> dict[str, Any]:
    """Admins only. An edit stops nothing that runs."""
    quotas.check_admin(request.user)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, body.team) if body.team is not None else None
    quota = quotas.edit_quota(
        request.user,
        pool,
        team,
        body.dict(exclude={"team", "reason"}, exclude_unset=True),
        body.reason,
    )
    return next(
        to_quota_row(team_usage)
        for team_usage in usage.list_team_usage(request.user, pool)
        if team_usage.quota.team_id == quota.team_id
    )


@router.post("/pools/{int:pool_id}/hold", response=PoolOut)
def set_hold(request: AuthenticatedRequest, pool_id: int, body: HoldIn) -> Pool:
    """Let nothing new start, of a team or in the whole pool; `drain`: what runs saves and waits.
    Leads: their own team only.
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
    """A person's own limits; nothing is limited by default. Admins only."""
    quotas.check_admin(request.user)
    return PersonalQuota.objects.filter(user=get_user_by_name(username)).first() or PersonalQuota()


@router.put("/people/{username}/quota", response=PersonalQuotaOut)
def set_personal_quota(
    request: AuthenticatedRequest, username: str, body: PersonalQuotaIn
) -> PersonalQuota:
    """Admins only."""
    quotas.check_admin(request.user)
    return quotas.edit_personal_quota(
        request.user,
        get_user_by_name(username),
        body.dict(exclude={"reason"}, exclude_unset=True),
        body.reason,
    )


@router.get("/usage", response=list[UsageOut])
def read_usage(
    request: AuthenticatedRequest, month: Annotated[str, Query(max_length=7)] = ""
) -> Any:
    """Device-seconds of a month (2026-11), recomputed from the ledger; leads see their teams'
    part.
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
    """Who did what, newest first; leads see what concerns their teams."""
    return filter_audit_entries(request.user, action, q)


@router.get("/audit/intact", response=dict[str, int | None])
def verify_audit(request: AuthenticatedRequest) -> dict[str, int | None]:
    """The id of the first entry that is not what was written, null if the whole chain holds; admins
    only.
    """
    quotas.check_admin(request.user)
    tampered_entry = audit.find_tampered_entry()
    return {"broken_at": tampered_entry.pk if tampered_entry else None}
