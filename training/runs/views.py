"""The Runs pages: the list, one run live, several side by side, and what people do to runs that are
there.
"""

from __future__ import annotations

from typing import Any, TypeVar

from django.contrib import messages
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils.cache import patch_vary_headers
from django.views.decorators.http import require_POST

from training.datasets.models import Dataset
from training.engine.metrics import metrics_as_dicts
from training.errors import NotFound, UserError
from training.formatting import format_bytes
from training.gpus import allocations
from training.people.requests import AuthenticatedRequest, async_chunks, parse_id
from training.people.visible import get_changeable, get_visible
from training.runs import actions, filters
from training.runs import run_files as runs_run_files
from training.runs.forecast.target_device import get_target_device
from training.runs.launch import yaml_file
from training.runs.live import messages as live_messages
from training.runs.metrics import comparison, table
from training.runs.models import Event, Run, Sweep
from training.runs.states import ENDED, OPEN, State
from training.runs.status import describe, figures_of
from training.runs.worker import oom_recovery

Answer = TypeVar("Answer", bound=HttpResponseBase)
LOG_LINES = 300
CHART_POINTS = 600  # twice as many line points: about one for each pixel of a wide screen


def runs(request: AuthenticatedRequest) -> HttpResponse:
    asked = filters.Asked.from_query(request.GET.dict())
    page = filters.one_page(request.user, asked, request.GET.get("page"))
    values = {
        "page": page,
        "asked": asked,
        "described": [(run, describe(run)) for run in page],
        "moving": any(run.state in OPEN for run in page),
        "sorts": [
            (name, asked.address(sort=next_sort(asked.sort, name))) for name in filters.SORTS
        ],
    }
    if request.headers.get("HX-Request") and not request.headers.get("HX-History-Restore-Request"):
        return two_bodies(render(request, "runs/_table.html", values))
    values |= {
        "states": State.choices,
        "options": filters.options(request.user),
        "filtered": bool(asked.address(sort="")),
        "has_data": Dataset.objects.visible_to(request.user).exists(),
        "has_archived": not page.paginator.count and Run.objects.visible_to(request.user).exists(),
    }
    return two_bodies(render(request, "runs/runs.html", values))


def two_bodies(answer: HttpResponse) -> HttpResponse:
    """The same address has a page and a fragment; no cache may give one for the other."""
    patch_vary_headers(answer, ["HX-Request"])
    answer["Cache-Control"] = "no-store"
    return answer


def next_sort(now: str, name: str) -> str:
    """A click sorts by a column, names from the first and numbers from the highest; a second one
    turns the order.
    """
    if now.removeprefix("-") == name:
        return name if now.startswith("-") else f"-{name}"
    return name if name in ("name", "model", "owner") else f"-{name}"


def run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(
        Run, request.user, run_id, "owner", "team", "base_model", "data__dataset", "sweep"
    )
    values = {
        **header_values(request, found),
        "snapshot": live_messages.snapshot(found.pk, CHART_POINTS),
        "chart_metrics": metrics_as_dicts(),
    }
    return render(request, "runs/run.html", values)


def header(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    """What depends on the state, fetched anew when that changes; the config besides, which trials
    may have changed.
    """
    found = get_visible(
        Run, request.user, run_id, "owner", "team", "base_model", "data__dataset", "sweep"
    )
    return render(request, "runs/_header_again.html", header_values(request, found))


def header_values(request: AuthenticatedRequest, found: Run) -> dict[str, Any]:
    mine = Run.objects.changeable_by(request.user).filter(pk=found.pk).exists()
    adapter = found.result() if found.state in ENDED else None
    return {
        "run": found,
        "state": describe(found),
        "adapter": adapter,
        "mine": mine,
        "holding": allocations.held_by(found.pk),
    }


@require_POST
def stop(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.stop_run(
        get_changeable(Run, request.user, run_id), discard=request.POST.get("how") == "discard"
    )
    return redirect("run", run_id)


@require_POST
def go_on(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.continue_run(request.user, get_changeable(Run, request.user, run_id))
    return redirect("run", run_id)


@require_POST
def edit(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    given = {name: request.POST[name] for name in ("name", "tags", "notes") if name in request.POST}
    actions.describe_run(request.user, found, **given)
    return redirect("run", run_id)


@require_POST
def archive(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.archive(
        request.user, get_visible(Run, request.user, run_id), back=request.POST.get("back") == "1"
    )
    return redirect("run", run_id)


@require_POST
def delete(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    freed = actions.delete(request.user, found, request.POST.get("name", ""))
    messages.success(request, f"{found.name} is deleted; {format_bytes(freed)} are free again.")
    return redirect("runs")


@require_POST
def archive_several(request: AuthenticatedRequest) -> HttpResponse:
    """Archive the ticked runs that one may change and that are over; says how many were not."""
    chosen = [parse_id(text) for text in request.POST.getlist("run")][: filters.RUNS_A_PAGE]
    done = 0
    found = Run.objects.changeable_by(request.user).filter(pk__in=chosen)
    for one in found.exclude(state__in=OPEN):
        actions.archive(request.user, one)
        done += 1
    left = len(chosen) - done
    words = f"{done} archived" + (
        f"; {left} left, since they are not over or not yours." if left else "."
    )
    messages.success(request, words)
    return redirect("runs")


def side_by_side(request: AuthenticatedRequest) -> HttpResponse:
    """`?run=1&run=2`: curves over each other, what differs, and who is best. The address holds the
    whole view.
    """
    wanted = list(dict.fromkeys(parse_id(text) for text in request.GET.getlist("run")))
    if not 2 <= len(wanted) <= comparison.MOST:
        raise UserError(
            f"Choose 2 to {comparison.MOST} runs to compare; {len(wanted)} are chosen.", field="run"
        )
    rows = Run.objects.visible_to(request.user).select_related(*filters.RELATED).in_bulk(wanted)
    if len(rows) < len(wanted):
        raise NotFound("One of these runs is not there, or not for you to see.")
    chosen = [rows[pk] for pk in wanted]
    settings = [
        {"model": str(one.base_model), "data": str(one.data), **one.config} for one in chosen
    ]
    values = {
        "runs": [(one, describe(one)) for one in chosen],
        "settings": comparison.differences(settings),
        "figures": comparison.figures([figures_of(one) for one in chosen]),
        "chosen": [
            {"id": one.pk, "name": one.name, "place": place} for place, one in enumerate(chosen)
        ],
        "chart_metrics": metrics_as_dicts(),
    }
    return render(request, "runs/compare.html", values)


def log(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    rows = (
        Event.objects.filter(run=found)
        .exclude(kind__in=("step", "memory", "sample"))
        .order_by("-seq")[:LOG_LINES]
    )
    return render(
        request,
        "runs/_log.html",
        {"events": reversed(rows), "output": runs_run_files.engine_output(found)},
    )


def run_files(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    mine = Run.objects.changeable_by(request.user).filter(pk=found.pk).exists()
    values = {
        "run": found,
        "files": runs_run_files.list_files(found),
        "steps": runs_run_files.kept_steps(found) if mine else [],
    }
    return render(request, "runs/_files.html", values)


def config_file(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id, "base_model", "data__dataset")
    return attachment(
        HttpResponse(yaml_file.to_yaml(found), content_type="application/yaml"), found, "yaml"
    )


def metrics_csv(request: AuthenticatedRequest, run_id: int) -> HttpResponseBase:
    found = get_visible(Run, request.user, run_id)
    return attachment(
        StreamingHttpResponse(async_chunks(table.as_csv(found)), content_type="text/csv"), found, "csv"
    )


def metrics_parquet(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    return attachment(
        HttpResponse(table.as_parquet(found), content_type="application/octet-stream"),
        found,
        "parquet",
    )


def attachment(answer: Answer, found: Run, ending: str) -> Answer:
    """A download under a name made of the run's number alone: no name of a person reaches a
    header.
    """
    answer["Content-Disposition"] = f'attachment; filename="run-{found.pk}.{ending}"'
    return answer


def show_ways(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    """What a run that ran out of memory can go on with, each with its forecast; `?make=1` simulates
    one that is missing first.
    """
    run = get_visible(Run, request.user, run_id, "base_model", "data__dataset", "pool")
    if request.GET.get("make"):
        oom_recovery.simulate_one(run)
    total = get_target_device(run.pool).total
    rows = [
        (way, way.memory["peak"] <= total if way.memory else None)
        for way in oom_recovery.ways_of(run)
    ]
    mine = Run.objects.changeable_by(request.user).filter(pk=run.pk).exists()
    unknown = any(way.memory is None for way, _ in rows)
    return render(
        request,
        "runs/_ways.html",
        {"run": run, "ways": rows, "total": total, "mine": mine, "unknown": unknown},
    )


@require_POST
def go_on_with(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "base_model", "data__dataset")
    oom_recovery.go_on_with(request.user, run, request.POST.get("way", ""))
    return redirect("run", run_id)


def show_sweep(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    found = get_visible(Sweep, request.user, sweep_id, "owner")
    runs = list(
        Run.objects.visible_to(request.user)
        .filter(sweep=found)
        .select_related(*filters.RELATED)
        .order_by("pk")
    )
    finished = [run for run in runs if run.best_eval_loss is not None]
    best = min(finished, key=lambda run: run.best_eval_loss or 0.0, default=None)
    rows = [
        (run, describe(run), [run.config.get(name) for name in found.grid], run == best)
        for run in runs
    ]
    values = {
        "sweep": found,
        "rows": rows,
        "best": best,
        "moving": any(run.state in OPEN for run in runs),
    }
    return render(
        request,
        "runs/_sweep.html" if request.headers.get("HX-Request") else "runs/sweep.html",
        values,
    )


@require_POST
def stop_sweep(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    actions.stop_all(get_changeable(Sweep, request.user, sweep_id))
    return redirect("sweep", sweep_id)
