"""Where admins edit what teams, people and pools may have: a dry run first, then the edit; hold,
and hold and drain, which leads may do to their own team.
"""

from __future__ import annotations

import math
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render

from training.errors import NotFound, UserError
from training.gpus import quotas, usage
from training.gpus.models import PersonalQuota, Pool, Quota
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.people.users import get_user_by_name
from training.runs.queue import what_if

GB = 10**9
# Field of the form -> field of the quota, type, and what one unit of the form is in the quota's.
TEAM_FORM = {
    "guaranteed": ("guaranteed", int, 1),
    "limit": ("limit", int, 1),
    "weight": ("weight", float, 1),
    "hours": ("hours_per_month", float, 1),
    "memory": ("max_bytes", float, GB),
    "longest": ("max_run_seconds", float, 3600),
}
PERSON_FORM = {
    "max_running": ("max_running", int, 1),
    "max_queued": ("max_queued", int, 1),
    "hours": ("hours_per_month", float, 1),
}
POOL_FORM = {
    "runs_per_device": ("runs_per_device", int, 1),
    "shortest": ("min_run_seconds", float, 60),
}
HOLD_ACTIONS = {"hold": (True, False), "drain": (True, True), "lift": (False, False)}


def read_form(form: dict[str, tuple[str, Any, int]], post_data: Any) -> dict[str, Any]:
    """What a form says, empty fields as None.

    Raises:
        UserError: a field is no number; `field` names it.
    """
    values: dict[str, Any] = {}
    for field, (name, kind, unit) in form.items():
        text = post_data.get(field, "").strip().replace(",", "")
        try:
            value = kind(text) * unit if text else None
            if value is not None and not math.isfinite(value):
                raise ValueError(text)
        except ValueError as error:
            raise UserError(f"{field}: {text[:40]!r} is not a number.", field=field) from error
        values[name] = (
            value if value is None or name in ("weight", "hours_per_month") else round(value)
        )
    return values


def apply_hold_action(request: AuthenticatedRequest, target: Pool | Quota) -> bool:
    """Whether one of the buttons for a hold was pressed; what it says is done."""
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


def edit_quota(request: AuthenticatedRequest, pool_id: int, team_id: int) -> HttpResponse:
    """A team's part of a pool (team 0: whoever is in no team). POST `action`: try, save, hold, drain
    or lift.
    """
    quotas.check_lead_or_admin(request.user)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, team_id) if team_id else None
    if not request.user.is_superuser and (
        team is None or team.pk not in (usage.get_visible_teams(request.user) or ())
    ):
        raise NotFound("There is no such quota that you may see.")
    team_usage = next(
        one
        for one in usage.list_team_usage(request.user, pool)
        if one.quota.team_id == (team.pk if team else None)
    )
    values: dict[str, Any] = {
        "pool": pool,
        "team": team,
        "line": team_usage,
        "burn": usage.compute_burn_down(pool, team),
    }
    if request.method != "POST":
        return render(
            request,
            "gpus/quota.html",
            values
            | {
                "form": format_form(team_usage.quota, TEAM_FORM),
                "is_hard_budget": team_usage.quota.is_hard_budget,
            },
        )
    if apply_hold_action(request, quotas.get_quota(pool, team)):
        return redirect("quota", pool_id, team_id)
    quotas.check_admin(request.user)
    action, reason = request.POST.get("action", ""), request.POST.get("reason", "")
    form_values = {
        "form": {name: request.POST.get(name, "") for name in TEAM_FORM},
        "is_hard_budget": bool(request.POST.get("is_hard_budget")),
    }
    try:
        changes = read_form(TEAM_FORM, request.POST) | {
            "is_hard_budget": bool(request.POST.get("is_hard_budget"))
        }
        edited_quota = quotas.apply_quota_changes(pool, team, changes)
        if action == "save":
            quotas.edit_quota(request.user, pool, team, changes, reason)
            messages.success(
                request,
                f"Saved what {team or 'no team'} may have of {pool}. Nothing that runs was "
                "stopped.",
            )
            return redirect("quotas")
    except UserError as error:
        return render(
            request,
            "gpus/quota.html",
            values | form_values | {"error": error, "reason": reason},
            status=error.status,
        )
    return render(
        request,
        "gpus/quota.html",
        values
        | form_values
        | {"moved": what_if.simulate_quota_edit(edited_quota), "tried": True, "reason": reason},
    )


def edit_pool(request: AuthenticatedRequest, pool_id: int) -> HttpResponse:
    """A pool's own settings; POST `action`: try, save, hold, drain or lift."""
    quotas.check_admin(request.user)
    current_pool = quotas.get_pool(pool_id)
    values: dict[str, Any] = {
        "pool": current_pool,
        "name": current_pool.name,
        "form": format_form(current_pool, POOL_FORM),
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
            messages.success(request, f"Saved {current_pool}. Nothing that runs was stopped.")
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
        | {"moved": what_if.simulate_pool_edit(edited_pool), "tried": True, "reason": reason},
    )


def edit_person(request: AuthenticatedRequest, username: str) -> HttpResponse:
    """What one person may have over all pools."""
    quotas.check_admin(request.user)
    user = get_user_by_name(username)
    personal_quota = PersonalQuota.objects.filter(user=user).first() or PersonalQuota(user=user)
    values: dict[str, Any] = {
        "person": user,
        "form": format_form(personal_quota, PERSON_FORM),
        "is_hard_budget": personal_quota.is_hard_budget,
    }
    if request.method != "POST":
        return render(request, "gpus/person.html", values)
    try:
        changes = read_form(PERSON_FORM, request.POST) | {
            "is_hard_budget": bool(request.POST.get("is_hard_budget"))
        }
        quotas.edit_personal_quota(request.user, user, changes, request.POST.get("reason", ""))
    except UserError as error:
        form_values = {
            "form": {name: request.POST.get(name, "") for name in PERSON_FORM},
            "is_hard_budget": bool(request.POST.get("is_hard_budget")),
        }
        return render(
            request,
            "gpus/person.html",
            values | form_values | {"error": error},
            status=error.status,
        )
    messages.success(request, f"Saved what {username} may have. Nothing that runs was stopped.")
    return redirect("quotas")


def format_form(
    row: Quota | PersonalQuota | Pool, form: dict[str, tuple[str, Any, int]]
) -> dict[str, str]:
    """A row's numbers in the form's units."""
    form_values = {}
    for field, (name, _, unit) in form.items():
        value = getattr(row, name)
        form_values[field] = "" if value is None else f"{value / unit:g}"
    return form_values
