"""The GPUs page (devices with their runs, the queue, the timeline of allocations), the actions of
the queue, and the list of quotas.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import groupby
from typing import Any

from django.conf import settings
from django.db.models import Count, F
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from training.errors import NotFound
from training.gpus import quotas, usage
from training.gpus.devices import is_offline
from training.gpus.models import Allocation, Condition, Device, Pool
from training.gpus.option_sources import POOLS
from training.people.models import Team, User
from training.people.options import Options
from training.people.pagination import paginate
from training.people.permissions import get_changeable
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.models import Run
from training.runs.queue import actions
from training.runs.states import Priority, State

TIME_SPANS = {"day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30)}
MAX_INTERVALS = 1_000
WAITING_PER_PAGE = 40
DEVICES_PER_PAGE = 50
QUOTAS_PER_PAGE = 100
USERS_PER_PAGE = 50
MAX_LISTED_POOLS = 10  # in the menu of a waiting run; more are searched


@require_safe
def show_gpus(request: AuthenticatedRequest) -> HttpResponse:
    values = {**load_devices(request), **load_queue(request)}
    if request.headers.get("HX-Request"):
        return render(request, "gpus/_queue_and_devices.html", values)
    return render(request, "gpus/gpus.html", values | {"spans": TIME_SPANS})


def load_devices(request: AuthenticatedRequest) -> dict[str, Any]:
    """A page of the devices by pool, and on each device the runs that the user may see."""
    pairs = Pool.objects.order_by("name", "devices__host__name", "devices__index", "devices")
    page = paginate(request, pairs.values_list("pk", "devices"), DEVICES_PER_PAGE, "devices")
    pools = Pool.objects.annotate(num_devices=Count("devices")).in_bulk(
        {pool_id for pool_id, _ in page}
    )
    in_use = Allocation.objects.filter(released_at=None, device__pool__in=pools)
    num_busy = dict(
        in_use.values_list("device__pool").annotate(count=Count("device", distinct=True))
    )
    devices = Device.objects.select_related("host").in_bulk([pk for _, pk in page if pk])
    allocations = load_allocations(request.user, list(devices))
    return {
        "devices_page": page,
        "pools": [
            (
                pools[pool_id],
                num_busy.get(pool_id, 0),
                [describe_device(devices[pk], allocations.get(pk, [])) for _, pk in group if pk],
            )
            for pool_id, group in groupby(page, key=lambda pair: pair[0])
        ],
    }


def load_allocations(
    user: User, device_ids: list[int]
) -> dict[int, list[tuple[Allocation, Run | None]]]:
    """The open allocations by device, each with its run if the user may see it."""
    open_allocations = list(
        Allocation.objects.filter(released_at=None, device__in=device_ids).select_related(
            "user", "team"
        )
    )
    visible_runs = (
        Run.objects.visible_to(user)
        .defer("config", "start_info", "auto_plan")
        .in_bulk([one.run_id for one in open_allocations])
    )
    by_device: dict[int, list[tuple[Allocation, Run | None]]] = {}
    for one in open_allocations:
        by_device.setdefault(one.device_id, []).append((one, visible_runs.get(one.run_id)))
    return by_device


def describe_device(
    device: Device, allocations: list[tuple[Allocation, Run | None]]
) -> dict[str, Any]:
    return {
        "device": device,
        "is_offline": is_offline(device.host),
        "is_checking": device.condition == Condition.CHECKING,
        "allocations": allocations,
        "is_idle": bool(allocations) and usage.is_idle_in_use(device),
        "used_percent": round(100 * device.used_bytes / device.total_bytes)
        if device.total_bytes
        else 0,
    }


def load_queue(request: AuthenticatedRequest) -> dict[str, Any]:
    """The queued runs in their order. Runs that the user may not see are only counted."""
    waiting = Run.objects.filter(state=State.QUEUED)
    visible_runs = Run.objects.visible_to(request.user).filter(state=State.QUEUED)
    ordered = visible_runs.order_by(
        F("queue_info__position").asc(nulls_last=True), "queued_at"
    ).select_related("owner", "team", "pool")
    page = paginate(
        request,
        ordered.defer("config", "start_info", "auto_plan", "sparkline"),
        WAITING_PER_PAGE,
        "queue",
    )
    changeable_ids = set(
        Run.objects.changeable_by(request.user)
        .filter(pk__in=[run.pk for run in page])
        .values_list("pk", flat=True)
    )
    pools = list(Pool.objects.all()[: MAX_LISTED_POOLS + 1])
    return {
        "queue_page": page,
        "waiting": [(run, run.pk in changeable_ids) for run in page],
        "num_hidden": waiting.count() - page.paginator.count,
        "priorities": Priority.choices,
        "all_pools": pools,
        "pool_search": Options(POOLS.name, [], "", has_more=len(pools) > MAX_LISTED_POOLS),
    }


@require_safe
def get_timeline(request: AuthenticatedRequest) -> JsonResponse:
    """Allocations for the chart: all for admins, else those of the user and of the teams that they
    lead.
    """
    begin = timezone.now() - TIME_SPANS.get(request.GET.get("span", "day"), TIME_SPANS["day"])
    intervals = usage.find_intervals(request.user, begin)
    latest = intervals.select_related("device__host").order_by("-started_at")[:MAX_INTERVALS]
    rows = [
        {
            "device": f"{one.device.host.name} · {one.device.index}",
            "team": one.team.name if one.team else one.user.username,
            "run": one.run_name,
            "id": one.run_id,
            "user": one.user.username,
            "from": max(one.started_at, begin).timestamp(),
            "to": (one.released_at or timezone.now()).timestamp(),
            "preempted": one.evicted_at is not None,
        }
        for one in reversed(latest)
    ]
    payload = {
        "begin": begin.timestamp(),
        "end": timezone.now().timestamp(),
        "rows": rows,
        "left_out": intervals.count() - len(rows),
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
    pools = Pool.objects.all()
    teams = usage.list_quota_teams(request.user)
    page = paginate(request, range(pools.count() * len(teams)), QUOTAS_PER_PAGE)
    users = paginate(
        request,
        User.objects.filter(is_active=True).order_by("username"),
        USERS_PER_PAGE,
        "users",
    )
    context = {
        "page": page,
        "pools": load_quotas(pools, teams, list(page)),
        "users": users,
        "people": usage.list_person_usage(list(users)) if request.user.is_superuser else [],
        "month": timezone.now(),
        "max_queued_runs": settings.MAX_QUEUED_RUNS,
    }
    return render(request, "gpus/quotas.html", context)


def load_quotas(
    pools: Any, teams: list[Team | None], positions: list[int]
) -> list[tuple[Pool, list[usage.TeamUsage]]]:
    """The usage by pool. A position is one in the list of all pools, each with all teams."""
    if not positions:
        return [(pool, []) for pool in pools[:QUOTAS_PER_PAGE]]
    first, last = positions[0] // len(teams), positions[-1] // len(teams)
    shown = dict(enumerate(pools[first : last + 1], start=first))
    pairs = [(shown[one // len(teams)], teams[one % len(teams)]) for one in positions]
    rows = groupby(usage.list_team_usage(pairs), key=lambda row: row.quota.pool)
    return [(pool, list(group)) for pool, group in rows]
