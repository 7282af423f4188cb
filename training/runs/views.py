"""Pages of runs: the list, one live run, comparisons and sweeps, and the actions on them."""

from __future__ import annotations

from typing import Any, TypeVar

from django.contrib import messages
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.cache import patch_vary_headers
from django.views.decorators.http import require_POST, require_safe

from training.datasets.models import Dataset
from training.engine.metrics import metrics_as_dicts
from training.errors import NotFound, UserError
from training.formatting import format_bytes
from training.gpus import allocations
from training.people.pagination import paginate
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, async_chunks, parse_int_or_zero
from training.runs import actions, filters, run_files
from training.runs.forecast.target_device import get_target_device
from training.runs.launch import yaml_file
from training.runs.live import messages as live_messages
from training.runs.metrics import comparison, table
from training.runs.models import Event, Run, Sweep
from training.runs.states import ENDED, UNFINISHED, State
from training.runs.status import get_comparison_figures, get_run_status
from training.runs.worker import oom_recovery

Response = TypeVar("Response", bound=HttpResponseBase)
LOG_LINES = 300
CHART_POINTS = 600  # a line has twice as many points, about one per pixel of a wide screen


@require_safe
def list_runs(request: AuthenticatedRequest) -> HttpResponse:
    run_filters = filters.RunFilters.from_query(request.GET.dict())
    page = paginate(request, filters.filter_runs(request.user, run_filters), filters.RUNS_PER_PAGE)
    has_unfinished = any(run.state in UNFINISHED for run in page)
    values = {
        "page": page,
        "run_filters": run_filters,
        "run_rows": [(run, get_run_status(run)) for run in page],
        "poll_address": request.get_full_path() if has_unfinished else "",
        "sort_links": [
            (
                name,
                run_filters.build_query_string(sort=get_next_sort(run_filters.sort, name)),
                get_sort_order(run_filters.sort, name),
            )
            for name in filters.SORT_COLUMNS
        ],
    }
    if request.headers.get("HX-Request") and not request.headers.get("HX-History-Restore-Request"):
        return vary_on_htmx(render(request, "runs/_table.html", values))
    values |= {
        "states": State.choices,
        "filter_options": filters.list_filter_options(request.user, run_filters),
        "is_filtered": bool(run_filters.build_query_string(sort="")),
        "has_data": Dataset.objects.visible_to(request.user).exists(),
        "has_archived": not page.paginator.count and Run.objects.visible_to(request.user).exists(),
    }
    return vary_on_htmx(render(request, "runs/runs.html", values))


def vary_on_htmx(response: HttpResponse) -> HttpResponse:
    """Prevent caching, because the same URL returns a page or a fragment."""
    patch_vary_headers(response, ["HX-Request"])
    response["Cache-Control"] = "no-store"
    return response


def get_sort_order(current_sort: str, name: str) -> str:
    """The value of the column's aria-sort attribute; empty if the list has another order."""
    return {name: "ascending", f"-{name}": "descending"}.get(current_sort, "")


def get_next_sort(current_sort: str, name: str) -> str:
    """The sort order after a click on a column: text ascending, numbers descending. A second click
    reverses the order.
    """
    if current_sort.removeprefix("-") == name:
        return name if current_sort.startswith("-") else f"-{name}"
    return name if name in ("name", "model", "owner") else f"-{name}"


@require_safe
def show_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(
        Run, request.user, run_id, "owner", "team", "base_model", "data__dataset", "sweep"
    )
    values = {
        **get_header_context(request, run),
        "snapshot": live_messages.build_snapshot(run.pk, CHART_POINTS),
        "chart_metrics": metrics_as_dicts(),
    }
    return render(request, "runs/run.html", values)


@require_safe
def show_header(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    """The parts of the page that depend on the state, and the config, which trials may change. The
    page fetches them when the state changes.
    """
    run = get_visible(
        Run, request.user, run_id, "owner", "team", "base_model", "data__dataset", "sweep"
    )
    return render(request, "runs/_header_again.html", get_header_context(request, run))


def get_header_context(request: AuthenticatedRequest, run: Run) -> dict[str, Any]:
    can_change = Run.objects.changeable_by(request.user).filter(pk=run.pk).exists()
    adapter = run.get_result_version() if run.state in ENDED else None
    return {
        "run": run,
        "state": get_run_status(run),
        "adapter": adapter,
        "can_change": can_change,
        "can_stop": can_change and run.state in (State.QUEUED, State.STARTING, State.RUNNING),
        "allocation": allocations.get_allocation(run.pk),
    }


@require_POST
def stop_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.stop_run(
        get_changeable(Run, request.user, run_id), discard=request.POST.get("how") == "discard"
    )
    return redirect("run", run_id)


@require_POST
def continue_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.continue_run(request.user, get_changeable(Run, request.user, run_id))
    return redirect("run", run_id)


@require_POST
def edit_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id)
    changes = {
        name: request.POST[name] for name in ("name", "tags", "notes") if name in request.POST
    }
    actions.update_run(request.user, run, **changes)
    return redirect("run", run_id)


@require_POST
def archive_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    actions.archive_run(
        request.user,
        get_visible(Run, request.user, run_id),
        restore=request.POST.get("restore") == "1",
    )
    return redirect("run", run_id)


@require_POST
def delete_run(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id)
    freed = actions.delete_run(request.user, run, request.POST.get("name", ""))
    messages.success(request, f"{run.name} was deleted; {format_bytes(freed)} freed.")
    return redirect("runs")


@require_POST
def archive_runs(request: AuthenticatedRequest) -> HttpResponse:
    """Archive the selected runs that the user may change and that have ended; report how many were
    skipped.
    """
    run_ids = [parse_int_or_zero(text) for text in request.POST.getlist("run")][
        : filters.RUNS_PER_PAGE
    ]
    archived = 0
    runs = Run.objects.changeable_by(request.user).filter(pk__in=run_ids)
    for run in runs.exclude(state__in=UNFINISHED):
        actions.archive_run(request.user, run)
        archived += 1
    skipped = len(run_ids) - archived
    note = f" {skipped} skipped: still active, or not yours." if skipped else ""
    messages.success(request, f"{archived} archived.{note}")
    return redirect("runs")


@require_safe
def compare_runs(request: AuthenticatedRequest) -> HttpResponse:
    """`?run=1&run=2`: compare curves, settings and figures. The URL contains the whole view."""
    run_ids = list(dict.fromkeys(parse_int_or_zero(text) for text in request.GET.getlist("run")))
    if not 2 <= len(run_ids) <= comparison.MAX_COMPARED_RUNS:
        raise UserError(
            f"Choose 2 to {comparison.MAX_COMPARED_RUNS} runs to compare, not {len(run_ids)}.",
            field="run",
        )
    rows = Run.objects.visible_to(request.user).select_related(*filters.RELATED).in_bulk(run_ids)
    if len(rows) < len(run_ids):
        raise NotFound("At least one of these runs does not exist, or you may not see it.")
    compared = [rows[pk] for pk in run_ids]
    settings = [
        {"model": str(one.base_model), "data": str(one.data), **one.config} for one in compared
    ]
    values = {
        "runs": [(one, get_run_status(one)) for one in compared],
        "settings": comparison.compare_settings(settings),
        "figures": comparison.compare_figures([get_comparison_figures(one) for one in compared]),
        "chosen": [
            {"id": one.pk, "name": one.name, "index": index} for index, one in enumerate(compared)
        ],
        "chart_metrics": metrics_as_dicts(),
    }
    return render(request, "runs/compare.html", values)


@require_safe
def show_log(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id)
    rows = (
        Event.objects.filter(run=run)
        .exclude(kind__in=("step", "memory", "sample"))
        .order_by("-seq")[:LOG_LINES]
    )
    return render(
        request,
        "runs/_log.html",
        {"events": reversed(rows), "output": run_files.read_engine_output(run)},
    )


@require_safe
def show_files(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id)
    can_change = Run.objects.changeable_by(request.user).filter(pk=run.pk).exists()
    values = {
        "run": run,
        "files": run_files.list_files(run),
        "steps": run_files.list_checkpoint_steps(run) if can_change else [],
    }
    return render(request, "runs/_files.html", values)


@require_safe
def download_config(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id, "base_model", "data__dataset")
    return add_download_header(
        HttpResponse(yaml_file.to_yaml(run), content_type="application/yaml"), run, "yaml"
    )


@require_safe
def download_csv(request: AuthenticatedRequest, run_id: int) -> HttpResponseBase:
    run = get_visible(Run, request.user, run_id)
    return add_download_header(
        StreamingHttpResponse(async_chunks(table.stream_csv(run)), content_type="text/csv"),
        run,
        "csv",
    )


@require_safe
def download_parquet(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_visible(Run, request.user, run_id)
    return add_download_header(
        HttpResponse(table.encode_parquet(run), content_type="application/octet-stream"),
        run,
        "parquet",
    )


def add_download_header(response: Response, run: Run, extension: str) -> Response:
    """A download whose file name contains only the run's id, so that no user input reaches a
    header.
    """
    response["Content-Disposition"] = f'attachment; filename="run-{run.pk}.{extension}"'
    return response


@require_safe
def show_memory_options(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    """The options to resume a run that ran out of memory, each with its forecast. `?forecast=1`
    first simulates one option that has no forecast yet.
    """
    run = get_visible(Run, request.user, run_id, "base_model", "data__dataset", "pool")
    if request.GET.get("forecast"):
        oom_recovery.forecast_next_option(run)
    total = get_target_device(run.pool).total
    rows = [
        (option, option.memory["peak"] <= total if option.memory else None)
        for option in oom_recovery.list_recovery_options(run)
    ]
    can_change = Run.objects.changeable_by(request.user).filter(pk=run.pk).exists()
    has_unknown = any(option.memory is None for option, _ in rows)
    return render(
        request,
        "runs/_memory_options.html",
        {
            "run": run,
            "memory_options": rows,
            "total": total,
            "can_change": can_change,
            "has_unknown": has_unknown,
        },
    )


@require_POST
def apply_memory_option(request: AuthenticatedRequest, run_id: int) -> HttpResponse:
    run = get_changeable(Run, request.user, run_id, "base_model", "data__dataset")
    oom_recovery.apply_memory_option(request.user, run, request.POST.get("option", ""))
    return redirect("run", run_id)


@require_safe
def show_sweep(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    sweep = get_visible(Sweep, request.user, sweep_id, "owner")
    runs = list(
        Run.objects.visible_to(request.user)
        .filter(sweep=sweep)
        .select_related(*filters.RELATED)
        .order_by("pk")
    )
    finished = [run for run in runs if run.best_eval_loss is not None]
    best = min(finished, key=lambda run: run.best_eval_loss or 0.0, default=None)
    rows = [
        (run, get_run_status(run), [run.config.get(name) for name in sweep.grid], run == best)
        for run in runs
    ]
    has_unfinished = any(run.state in UNFINISHED for run in runs)
    values = {
        "sweep": sweep,
        "rows": rows,
        "best": best,
        "has_unfinished": has_unfinished,
        "poll_address": reverse("sweep", args=[sweep.pk]) if has_unfinished else "",
    }
    return render(
        request,
        "runs/_sweep.html" if request.headers.get("HX-Request") else "runs/sweep.html",
        values,
    )


@require_POST
def stop_sweep(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    actions.stop_sweep(get_changeable(Sweep, request.user, sweep_id))
    return redirect("sweep", sweep_id)
