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
    "hours": ("hours_a_month", float, 1),
    "memory": ("most_bytes", float, GB),
    "longest": ("longest_seconds", float, 3600),
}
PERSON_FORM = {
    "running": ("running", int, 1),
    "queued": ("queued", int, 1),
    "hours": ("hours_a_month", float, 1),
}
POOL_FORM = {
    "runs_per_device": ("runs_per_device", int, 1),
    "shortest": ("shortest_seconds", float, 60),
}
HOLDS = {"hold": (True, False), "drain": (True, True), "lift": (False, False)}


def read_form(form: dict[str, tuple[str, Any, int]], posted: Any) -> dict[str, Any]:
    """What a form says, empty fields as None.

    Raises:
        UserError: a field is no number; `field` names it.
    """
    found: dict[str, Any] = {}
    for field, (name, kind, unit) in form.items():
        text = posted.get(field, "").strip().replace(",", "")
        try:
            value = kind(text) * unit if text else None
            if value is not None and not math.isfinite(value):
                raise ValueError(text)
        except ValueError as error:
            raise UserError(f"{field}: {text[:40]!r} is not a number.", field=field) from error
        found[name] = (
            value if value is None or name in ("weight", "hours_a_month") else round(value)
        )
    return found


def hold_if_asked(request: AuthenticatedRequest, target: Pool | Quota) -> bool:
    """Whether one of the buttons for a hold was pressed; what it says is done."""
    held, drain = HOLDS.get(request.POST.get("act", ""), (None, False))
    if held is None:
        return False
    quotas.hold(request.user, target, held=held, drain=drain, reason=request.POST.get("reason", ""))
    return True


def quota(request: AuthenticatedRequest, pool_id: int, team_id: int) -> HttpResponse:
    """A team's part of a pool (team 0: whoever is in no team). POST `act`: try, save, hold, drain
    or lift.
    """
    quotas.refuse_strangers(request.user)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, team_id) if team_id else None
    if not request.user.is_superuser and (
        team is None or team.pk not in (usage.teams_seen(request.user) or ())
    ):
        raise NotFound("There is no such quota that you may see.")
    line = next(
        one
        for one in usage.team_lines(request.user, pool)
        if one.quota.team_id == (team.pk if team else None)
    )
    values: dict[str, Any] = {
        "pool": pool,
        "team": team,
        "line": line,
        "burn": usage.burn_down(pool, team),
    }
    if request.method != "POST":
        return render(
            request,
            "gpus/quota.html",
            values | {"form": shown(line.quota, TEAM_FORM), "hard": line.quota.hard},
        )
    if hold_if_asked(request, quotas.quota_of(pool, team)):
        return redirect("quota", pool_id, team_id)
    quotas.admins_only(request.user)
    act, reason = request.POST.get("act", ""), request.POST.get("reason", "")
    typed = {
        "form": {name: request.POST.get(name, "") for name in TEAM_FORM},
        "hard": bool(request.POST.get("hard")),
    }
    try:
        changes = read_form(TEAM_FORM, request.POST) | {"hard": bool(request.POST.get("hard"))}
        checked = quotas.checked_quota(pool, team, changes)
        if act == "save":
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
            values | typed | {"error": error, "reason": reason},
            status=error.status,
        )
    return render(
        request,
        "gpus/quota.html",
        values | typed | {"moved": what_if.quota_edit(checked), "tried": True, "reason": reason},
    )


def pool(request: AuthenticatedRequest, pool_id: int) -> HttpResponse:
    """A pool's own settings; POST `act`: try, save, hold, drain or lift."""
    quotas.admins_only(request.user)
    found = quotas.get_pool(pool_id)
    values: dict[str, Any] = {"pool": found, "name": found.name, "form": shown(found, POOL_FORM)}
    if request.method != "POST":
        return render(request, "gpus/pool.html", values)
    if hold_if_asked(request, found):
        return redirect("quota-pool", pool_id)
    act, reason = request.POST.get("act", ""), request.POST.get("reason", "")
    values |= {
        "name": request.POST.get("name", ""),
        "form": {name: request.POST.get(name, "") for name in POOL_FORM},
    }
    try:
        changes = {k: v for k, v in read_form(POOL_FORM, request.POST).items() if v is not None} | {
            "name": values["name"]
        }
        if act == "save":
            quotas.edit_pool(request.user, found, changes, reason)
            messages.success(request, f"Saved {found}. Nothing that runs was stopped.")
            return redirect("quotas")
        tried = quotas.checked_pool(found, changes)
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
        values | {"moved": what_if.pool_edit(tried), "tried": True, "reason": reason},
    )


def person(request: AuthenticatedRequest, username: str) -> HttpResponse:
    """What one person may have over all pools."""
    quotas.admins_only(request.user)
    user = get_user_by_name(username)
    kept = PersonalQuota.objects.filter(user=user).first() or PersonalQuota(user=user)
    values: dict[str, Any] = {"person": user, "form": shown(kept, PERSON_FORM), "hard": kept.hard}
    if request.method != "POST":
        return render(request, "gpus/person.html", values)
    try:
        changes = read_form(PERSON_FORM, request.POST) | {"hard": bool(request.POST.get("hard"))}
        quotas.edit_person(request.user, user, changes, request.POST.get("reason", ""))
    except UserError as error:
        typed = {
            "form": {name: request.POST.get(name, "") for name in PERSON_FORM},
            "hard": bool(request.POST.get("hard")),
        }
        return render(
            request, "gpus/person.html", values | typed | {"error": error}, status=error.status
        )
    messages.success(request, f"Saved what {username} may have. Nothing that runs was stopped.")
    return redirect("quotas")


def shown(
    row: Quota | PersonalQuota | Pool, form: dict[str, tuple[str, Any, int]]
) -> dict[str, str]:
    """A row's numbers in the form's units."""
    found = {}
    for field, (name, _, unit) in form.items():
        value = getattr(row, name)
        found[field] = "" if value is None else f"{value / unit:g}"
    return found
