"""The GPUs page: devices as they are, who holds what, and the queue with every place, reason and
time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db.models import F
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST

from training.errors import NotFound
from training.gpus import quotas, usage
from training.gpus.devices import is_gone
from training.gpus.models import Allocation, Device, Pool
from training.people.requests import AuthenticatedRequest, parse_id
from training.people.visible import get_changeable
from training.runs.models import Run
from training.runs.queue import actions
from training.runs.states import Priority, State

SPANS = {"day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30)}
MOST_INTERVALS = 5_000
MOST_WAITING = 200


def gpus(request: AuthenticatedRequest) -> HttpResponse:
    values = {"pools": pools_for(request), **queue_for(request)}
    if request.headers.get("HX-Request"):
        return render(request, "gpus/_gpus.html", values)
    return render(request, "gpus/gpus.html", values | {"spans": SPANS})


def pools_for(request: AuthenticatedRequest) -> list[dict[str, Any]]:
    """Every pool with its devices, and on each the runs that this person may see."""
    held: dict[int, list[tuple[Allocation, Run | None]]] = {}
    allocations = list(Allocation.objects.filter(released_at=None).select_related("user", "team"))
    seen = (
        Run.objects.visible_to(request.user)
        .defer("config", "start_info", "auto_plan")
        .in_bulk([one.run_id for one in allocations])
    )
    for one in allocations:
        held.setdefault(one.device_id, []).append((one, seen.get(one.run_id)))
    found = []
    for pool in Pool.objects.prefetch_related("devices__host"):
        devices = [
            {
                "device": device,
                "gone": is_gone(device.host),
                "held": held.get(device.pk, []),
                "idle": device.pk in held and usage.idle_but_held(device),
                "share": round(100 * device.used_bytes / device.total_bytes)
                if device.total_bytes
                else 0,
            }
            for device in pool.devices.all()
        ]
        found.append(
            {"pool": pool, "devices": devices, "busy": sum(bool(one["held"]) for one in devices)}
        )
    return found


def queue_for(request: AuthenticatedRequest) -> dict[str, Any]:
    """Who waits, in their order; of those whom the person may not see, only how many."""
    waiting = Run.objects.filter(state=State.QUEUED)
    seen = Run.objects.visible_to(request.user).filter(state=State.QUEUED)
    ordered = seen.order_by(F("waits__place").asc(nulls_last=True), "queued_at").select_related(
        "owner", "team", "pool"
    )
    mine, count = (
        list(ordered.defer("config", "start_info", "auto_plan", "sparkline")[:MOST_WAITING]),
        seen.count(),
    )
    may_change = set(
        Run.objects.changeable_by(request.user)
        .filter(pk__in=[run.pk for run in mine])
        .values_list("pk", flat=True)
    )
    rows = [(run, run.pk in may_change) for run in mine]
    return {
        "waiting": rows,
        "hidden": waiting.count() - count,
        "cut": count - len(mine),
        "classes": Priority.choices,
    }


def timeline(request: AuthenticatedRequest) -> JsonResponse:
    """Intervals for the chart: all for admins, their teams' and their own for others."""
    begin = timezone.now() - SPANS.get(request.GET.get("span", "day"), SPANS["day"])
    found = usage.intervals(request.user, begin)
    devices = Device.objects.select_related("host", "pool").in_bulk(list(found))
    held = sorted(
        (one for several in found.values() for one in several), key=lambda one: one.started_at
    )
    rows = [
        {
            "device": f"{devices[one.device_id].host.name} · {devices[one.device_id].index}",
            "team": one.team.name if one.team else one.user.username,
            "run": one.run_name,
            "id": one.run_id,
            "user": one.user.username,
            "from": max(one.started_at, begin).timestamp(),
            "to": (one.released_at or timezone.now()).timestamp(),
            "preempted": one.evicted_at is not None,
        }
        for one in held[-MOST_INTERVALS:]  # the latest
    ]
    told = {
        "begin": begin.timestamp(),
        "end": timezone.now().timestamp(),
        "rows": rows,
        "left_out": len(held) - len(rows),
    }
    return JsonResponse(told)


@require_POST
def move_up(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.move_up(get_changeable(Run, request.user, run_id))
    return redirect("run", run_id) if request.POST.get("back") == "run" else redirect("gpus")


@require_POST
def change_class(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "team")
    actions.change_class(
        request.user, run, request.POST.get("priority", ""), request.POST.get("reason", "")
    )
    return redirect("gpus")


@require_POST
def change_pool(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "team")
    pool = Pool.objects.filter(pk=parse_id(request.POST.get("pool", ""))).first()
    if pool is None:
        raise NotFound("There is no such pool.", field="pool")
    actions.change_pool(request.user, run, pool)
    return redirect("run", run_id)


def quotas_page(request: AuthenticatedRequest) -> HttpResponse:
    """Pools, teams and people with what they may have, hold and have used; leads see their own
    teams.
    """
    quotas.refuse_strangers(request.user)
    pools = [(pool, usage.team_lines(request.user, pool)) for pool in Pool.objects.all()]
    people = usage.person_lines() if request.user.is_superuser else []
    return render(
        request, "gpus/quotas.html", {"pools": pools, "people": people, "month": timezone.now()}
    )
