"""Pages on which admins edit pools, team quotas and personal quotas, with a dry run before the edit
is saved. Team leads can put their own team on hold.
"""

from __future__ import annotations

import math
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

from training.errors import NotFound, UserError
from training.gpus import quotas, usage
from training.gpus.models import PersonalQuota, Pool, Quota
from training.people.models import Team, User
from training.people.permissions import check_admin
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.people.users import get_user_by_name
from training.runs.queue import what_if

GB = 10**9
# Field of the form -> field of the quota, type, factor from the form's unit to the quota's unit
TEAM_FORM = {
    "guaranteed": ("guaranteed", int, 1),
    "limit": ("limit", int, 1),
    "weight": ("weight", float, 1),
    "hours": ("hours_per_month", float, 1),
    "max_memory_gb": ("max_bytes", float, GB),
    "max_run_hours": ("max_run_seconds", float, 3600),
}
PERSON_FORM = {
    "max_running": ("max_running", int, 1),
    "max_queued": ("max_queued", int, 1),
    "hours": ("hours_per_month", float, 1),
}
POOL_FORM = {
    "runs_per_device": ("runs_per_device", int, 1),
    "min_run_minutes": ("min_run_seconds", float, 60),
}
# Button -> whether the hold is set, and whether running runs are drained
HOLD_ACTIONS = {"hold": (True, False), "drain": (True, True), "lift": (False, False)}


def read_form(form: dict[str, tuple[str, Any, int]], post_data: Any) -> dict[str, Any]:
    """The values of a form in the units of the model, None for empty fields.

    Raises:
        UserError: a field is not a number; `field` names it.
    """
    values: dict[str, Any] = {}
    for field, (name, kind, unit) in form.items():
        text = post_data.get(field, "").strip().replace(",", "")
        try:
            value = kind(text) * unit if text else None
            if value is not None and not math.isfinite(value):
                raise ValueError(text)
        except ValueError as error:
            raise UserError(
                f"{field} must be a number, but is {text[:40]!r}.",
                field=field,
                code="not_a_number",
            ) from error
        values[name] = (
            value if value is None or name in ("weight", "hours_per_month") else round(value)
        )
    return values


def apply_hold_action(request: AuthenticatedRequest, target: Pool | Quota) -> bool:
    """Apply a pressed hold, drain or lift button. Returns False if it was another button."""
    is_on_hold, drain = HOLD_ACTIONS.get(request.POST.get("action", ""), (None, False))
    if is_on_hold is None:
        return False
    quotas.set_hold(
        request.user,
        target,
        is_on_hold=is_on_hold,
        drain=drain,
        reason=request.POST.get("reason", ""),
    )
    return True


def get_visible_team(user: User, team_id: int) -> Team | None:
    """The team whose quotas a user wants to see; 0 stands for the users without a team.

    Raises:
        NotFound: the team does not exist, or the user is neither an admin nor its lead.
    """
    team = get_team(user, team_id) if team_id else None
    visible_ids = usage.get_visible_team_ids(user)
    if visible_ids is not None and (team is None or team.pk not in visible_ids):
        raise NotFound("This quota does not exist, or you may not see it.")
    return team


@require_http_methods(["GET", "HEAD", "POST"])
def edit_quota(request: AuthenticatedRequest, pool_id: int, team_id: int) -> HttpResponse:
    """A team's quota in a pool. The `action` of a POST is try, save, hold, drain or lift."""
    quotas.check_lead_or_admin(request.user)
    pool = quotas.get_pool(pool_id)
    team = get_visible_team(request.user, team_id)
    team_usage = usage.get_team_usage(pool, team)
    values: dict[str, Any] = {
        "pool": pool,
        "team": team,
        "team_usage": team_usage,
        "burn_down": usage.compute_burn_down(pool, team),
        "form": format_form(team_usage.quota, TEAM_FORM),
        "is_hard_budget": team_usage.quota.is_hard_budget,
        "is_on_hold": team_usage.quota.is_on_hold,
        "has_own_hold": team_usage.quota.has_admin_hold
        if request.user.is_superuser
        else team_usage.quota.has_lead_hold,
    }
    if request.method != "POST":
        return render(request, "gpus/quota.html", values)
    if apply_hold_action(request, quotas.get_quota(pool, team)):
        return redirect("quota", pool_id, team_id)
    check_admin(request.user, quotas.EDIT_QUOTAS)
    reason, is_hard_budget = request.POST.get("reason", ""), "is_hard_budget" in request.POST
    values |= {
        "form": {name: request.POST.get(name, "") for name in TEAM_FORM},
        "is_hard_budget": is_hard_budget,
        "reason": reason,
    }
    try:
        changes = read_form(TEAM_FORM, request.POST) | {"is_hard_budget": is_hard_budget}
        edited_quota = quotas.apply_quota_changes(pool, team, changes)
        if request.POST.get("action") == "save":
            quotas.edit_quota(request.user, pool, team, changes, reason)
            messages.success(
                request,
                f"Saved the quota of {team or 'users without a team'} in {pool}. Running runs "
                "were not stopped.",
            )
            return redirect("quotas")
    except UserError as error:
        return render(request, "gpus/quota.html", values | {"error": error}, status=error.status)
    values |= {"start_shifts": what_if.simulate_quota_edit(edited_quota), "is_dry_run": True}
    return render(request, "gpus/quota.html", values)


@require_http_methods(["GET", "HEAD", "POST"])
def edit_pool(request: AuthenticatedRequest, pool_id: int) -> HttpResponse:
    """A pool's settings. The `action` of a POST is try, save, hold, drain or lift."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    current_pool = quotas.get_pool(pool_id)
    values: dict[str, Any] = {
        "pool": current_pool,
        "name": current_pool.name,
        "form": format_form(current_pool, POOL_FORM),
        "is_on_hold": current_pool.is_on_hold,
        "has_own_hold": current_pool.is_on_hold,
    }
    if request.method != "POST":
        return render(request, "gpus/pool.html", values)
    if apply_hold_action(request, current_pool):
        return redirect("quota-pool", pool_id)
    action, reason = request.POST.get("action", ""), request.POST.get("reason", "")
    values |= {
        "name": request.POST.get("name", ""),
        "form": {name: request.POST.get(name, "") for name in POOL_FORM},
    }
    try:
        changes = {k: v for k, v in read_form(POOL_FORM, request.POST).items() if v is not None} | {
            "name": values["name"]
        }
        if action == "save":
            quotas.edit_pool(request.user, current_pool, changes, reason)
            messages.success(request, f"Saved {current_pool}. Running runs were not stopped.")
            return redirect("quotas")
        edited_pool = quotas.apply_pool_changes(current_pool, changes)
    except UserError as error:
        return render(
            request,
            "gpus/pool.html",
            values | {"error": error, "reason": reason},
            status=error.status,
        )
    return render(
        request,
        "gpus/pool.html",
        values
        | {
            "start_shifts": what_if.simulate_pool_edit(edited_pool),
            "is_dry_run": True,
            "reason": reason,
        },
    )


@require_http_methods(["GET", "HEAD", "POST"])
def edit_person(request: AuthenticatedRequest, username: str) -> HttpResponse:
    """A user's limits over all pools."""
    check_admin(request.user, quotas.EDIT_QUOTAS)
    user = get_user_by_name(username)
    personal_quota = PersonalQuota.objects.filter(user=user).first() or PersonalQuota(user=user)
    values: dict[str, Any] = {
        "person": user,
        "form": format_form(personal_quota, PERSON_FORM),
        "is_hard_budget": personal_quota.is_hard_budget,
        "max_queued_runs": settings.MAX_QUEUED_RUNS,
    }
    if request.method != "POST":
        return render(request, "gpus/person.html", values)
    try:
        changes = read_form(PERSON_FORM, request.POST) | {
            "is_hard_budget": "is_hard_budget" in request.POST
        }
        quotas.edit_personal_quota(request.user, user, changes, request.POST.get("reason", ""))
    except UserError as error:
        form_values = {
            "form": {name: request.POST.get(name, "") for name in PERSON_FORM},
            "is_hard_budget": "is_hard_budget" in request.POST,
        }
        return render(
            request,
            "gpus/person.html",
            values | form_values | {"error": error},
            status=error.status,
        )
    messages.success(request, f"Saved the limits of {username}. Running runs were not stopped.")
    return redirect("quotas")


def format_form(
    row: Quota | PersonalQuota | Pool, form: dict[str, tuple[str, Any, int]]
) -> dict[str, str]:
    """The model's values in the units of the form."""
    form_values = {}
    for field, (name, _, unit) in form.items():
        value = getattr(row, name)
        form_values[field] = "" if value is None else f"{value / unit:g}"
    return form_values
