"""The page of disk usage, and the form for the disk quota of a user or team."""

from __future__ import annotations

import math
import shutil

from django.conf import settings
from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from training.errors import UserError
from training.formatting import format_bytes
from training.gpus import quotas
from training.people import disk_quota
from training.people.models import Team, User
from training.people.pagination import paginate
from training.people.permissions import check_admin
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.people.users import get_user_by_name

GB = 10**9
TEAMS_PER_PAGE = 20


@require_safe
def show_disk_usage(request: AuthenticatedRequest) -> HttpResponse:
    user, holders = request.user, list[disk_quota.DiskUsage]()
    if user.is_superuser:
        for model in (User, Team):
            holders += disk_quota.list_largest_holders(model)
    teams = paginate(request, user.teams.order_by("name"), TEAMS_PER_PAGE, "teams")
    values = {
        "teams": teams,
        "usages": disk_quota.list_disk_usages([user, *teams]),
        "items": disk_quota.list_items(user),
        "holders": holders,
        "free_bytes": shutil.disk_usage(settings.HOME).free,
        "max_items": disk_quota.MAX_ITEMS,
    }
    return render(request, "gpus/disk.html", values)


@require_http_methods(["GET", "HEAD", "POST"])
def edit_user_quota(request: AuthenticatedRequest, username: str) -> HttpResponse:
    check_admin(request.user, quotas.EDIT_QUOTAS)
    return edit_quota(request, get_user_by_name(username))


@require_http_methods(["GET", "HEAD", "POST"])
def edit_team_quota(request: AuthenticatedRequest, team_id: int) -> HttpResponse:
    check_admin(request.user, quotas.EDIT_QUOTAS)
    return edit_quota(request, get_team(request.user, team_id))


def edit_quota(request: AuthenticatedRequest, holder: User | Team) -> HttpResponse:
    quota = holder.max_disk_bytes
    values = {
        "usage": disk_quota.get_disk_usage(holder),
        "max_disk_gb": "" if quota is None else f"{quota / GB:g}",
    }
    if request.method != "POST":
        return render(request, "gpus/disk_quota.html", values)
    text, reason = request.POST.get("max_disk_gb", "").strip(), request.POST.get("reason", "")
    try:
        quotas.edit_disk_quota(request.user, holder, parse_gigabytes(text), reason)
    except UserError as error:
        values |= {"error": error, "max_disk_gb": text, "reason": reason}
        return render(request, "gpus/disk_quota.html", values, status=error.status)
    new_quota = disk_quota.get_quota(holder)
    amount = "no limit" if new_quota is None else format_bytes(new_quota)
    messages.success(request, f"The disk quota of {holder} is now {amount}. Nothing was deleted.")
    return redirect("disk")


def parse_gigabytes(text: str) -> int | None:
    """Bytes; None for an empty text. Raises UserError: it is not a number."""
    if not text:
        return None
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes <= quotas.MAX_NUMBER / GB:
        raise UserError(
            f"Enter 0 to {quotas.MAX_NUMBER // GB:,} GB, such as 50 or 0.5, not {text[:40]!r}.",
            field="max_disk_gb",
        )
    return round(gigabytes * GB)
