"""The GPUs page (devices with their runs, the queue, the timeline of allocations), the actions of
the queue, and the list of quotas.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import F
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from training.errors import NotFound
from training.gpus import quotas, usage
from training.gpus.devices import is_offline
from training.gpus.models import Allocation, Condition, Device, Pool
from training.people.permissions import get_changeable
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.models import Run
from training.runs.queue import actions
from training.runs.states import Priority, State

TIME_SPANS = {"day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30)}
MAX_INTERVALS = 5_000
MAX_WAITING_ROWS = 200


@require_safe
def show_gpus(request: AuthenticatedRequest) -> HttpResponse:
    values = {"pools": load_pools(request), **load_queue(request)}
    if request.headers.get("HX-Request"):
        return render(request, "gpus/_queue_and_devices.html", values)
    return render(request, "gpus/gpus.html", values | {"spans": TIME_SPANS})


def load_pools(request: AuthenticatedRequest) -> list[dict[str, Any]]:
    """Every pool with its devices, and on each device the runs that the user may see."""
    device_allocations: dict[int, list[tuple[Allocation, Run | None]]] = {}
    allocations = list(Allocation.objects.filter(released_at=None).select_related("user", "team"))
    visible_runs = (
        Run.objects.visible_to(request.user)
        .defer("config", "start_info", "auto_plan")
        .in_bulk([one.run_id for one in allocations])
    )
    for one in allocations:
        device_allocations.setdefault(one.device_id, []).append((one, visible_runs.get(one.run_id)))
    pool_rows = []
    for pool in Pool.objects.prefetch_related("devices__host"):
        devices = [
            {
                "device": device,
                "is_offline": is_offline(device.host),
                "is_checking": device.condition == Condition.CHECKING,
                "allocations": device_allocations.get(device.pk, []),
                "is_idle": device.pk in device_allocations and usage.is_idle_in_use(device),
                "used_percent": round(100 * device.used_bytes / device.total_bytes)
                if device.total_bytes
                else 0,
            }
            for device in pool.devices.all()
        ]
        pool_rows.append(
            {
                "pool": pool,
                "devices": devices,
                "num_busy": sum(bool(device["allocations"]) for device in devices),
            }
        )
    return pool_rows


def load_queue(request: AuthenticatedRequest) -> dict[str, Any]:
    """The queued runs in their order. Runs that the user may not see are only counted."""
    waiting = Run.objects.filter(state=State.QUEUED)
    visible_runs = Run.objects.visible_to(request.user).filter(state=State.QUEUED)
    ordered = visible_runs.order_by(
        F("queue_info__position").asc(nulls_last=True), "queued_at"
    ).select_related("owner", "team", "pool")
    page_runs, count = (
        list(ordered.defer("config", "start_info", "auto_plan", "sparkline")[:MAX_WAITING_ROWS]),
        visible_runs.count(),
    )
    changeable_ids = set(
        Run.objects.changeable_by(request.user)
        .filter(pk__in=[run.pk for run in page_runs])
        .values_list("pk", flat=True)
    )
    rows = [(run, run.pk in changeable_ids) for run in page_runs]
    return {
        "waiting": rows,
        "num_hidden": waiting.count() - count,
        "num_more": count - len(page_runs),
        "priorities": Priority.choices,
    }


@require_safe
def get_timeline(request: AuthenticatedRequest) -> JsonResponse:
    """Allocations for the chart: all for admins, else those of the user and of the teams that they
    lead.
    """
    begin = timezone.now() - TIME_SPANS.get(request.GET.get("span", "day"), TIME_SPANS["day"])
    by_device = usage.list_intervals(request.user, begin)
    devices = Device.objects.select_related("host", "pool").in_bulk(list(by_device))
    intervals = sorted(
        (one for several in by_device.values() for one in several), key=lambda one: one.started_at
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
        for one in intervals[-MAX_INTERVALS:]  # the latest
    ]
    payload = {
        "begin": begin.timestamp(),
        "end": timezone.now().timestamp(),
        "rows": rows,
        "left_out": len(intervals) - len(rows),
    }
    return JsonResponse(payload)


@require_POST
def move_up(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.move_up(get_changeable(Run, request.user, run_id))
    return redirect("run", run_id) if request.POST.get("back") == "run" else redirect("gpus")


@require_POST
def change_priority(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "team")
    actions.change_priority(
        request.user, run, request.POST.get("priority", ""), request.POST.get("reason", "")
    )
    return redirect("gpus")


@require_POST
def change_pool(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "team")
    pool = Pool.objects.filter(pk=parse_int_or_zero(request.POST.get("pool", ""))).first()
    if pool is None:
        raise NotFound("This pool no longer exists. Choose another.", field="pool")
    actions.change_pool(request.user, run, pool)
    return redirect("run", run_id)


@require_safe
def show_quotas(request: AuthenticatedRequest) -> HttpResponse:
    """Quotas and usage of all teams and users. Leads see their own teams."""
    quotas.check_lead_or_admin(request.user)
    pools = [(pool, usage.list_team_usage(request.user, pool)) for pool in Pool.objects.all()]
    people = usage.list_person_usage() if request.user.is_superuser else []
    context = {
        "pools": pools,
        "people": people,
        "month": timezone.now(),
        "max_queued_runs": settings.MAX_QUEUED_RUNS,
    }
    return render(request, "gpus/quotas.html", context)
