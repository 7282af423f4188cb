"""Pages of the method benchmark: the form that starts it, and the report as a page, CSV or
Markdown.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from adapters.evaluation import benchmark
from adapters.evaluation.replies import KIND
from training.catalog.models import BaseModel
from training.catalog.option_sources import READY_MODELS
from training.datasets.option_sources import DATASET_VERSIONS
from training.datasets.permissions import get_visible_version
from training.engine.methods import METHODS
from training.errors import NotFound, UserError
from training.jobs.models import OPEN_STATES, Job
from training.people.options import list_options
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.models import Sweep
from training.runs.states import UNFINISHED
from training.runs.status import get_run_status


@require_http_methods(["GET", "HEAD", "POST"])
def new_benchmark(request: AuthenticatedRequest) -> HttpResponse:
    if request.method == "POST":
        try:
            return redirect("benchmark", launch_from_form(request).pk)
        except UserError as error:
            return render(
                request,
                "adapters/benchmark_new.html",
                {**get_form_context(request), "error": error},
                status=error.status,
            )
    return render(request, "adapters/benchmark_new.html", get_form_context(request))


def get_form_context(request: AuthenticatedRequest) -> dict[str, Any]:
    form = request.POST or request.GET
    return {
        "bases": list_options(request.user, READY_MODELS, form.get("model")),
        "datasets": list_options(request.user, DATASET_VERSIONS, form.get("data")),
        "budget": benchmark.Budget(),
        "form": form,
        "methods": [METHODS[name].title for name in benchmark.BENCHMARK_METHODS],
    }


def launch_from_form(request: AuthenticatedRequest) -> Sweep:
    base = BaseModel.objects.filter(pk=parse_int_or_zero(request.POST.get("model", ""))).first()
    if base is None:
        raise NotFound("Base model not found.", field="model")
    data = get_visible_version(request.user, parse_int_or_zero(request.POST.get("data", "")))
    defaults = benchmark.Budget()
    budget = {
        name: parse_int_or_zero(request.POST.get(name, "")) or getattr(defaults, name)
        for name in ("max_steps", "max_tokens_per_batch", "max_length")
    }
    return benchmark.launch_benchmark(
        request.user, base, data, benchmark.Budget(**budget), name=request.POST.get("name", "")
    )


def get_benchmark(request: AuthenticatedRequest, sweep_id: int) -> Sweep:
    """Raises NotFound if the sweep does not exist, is not visible to the user, or is not a
    benchmark.
    """
    sweep = get_visible(Sweep, request.user, sweep_id, "owner")
    if not benchmark.is_benchmark(sweep):
        raise NotFound(f"Sweep {sweep_id} is not a method benchmark.")
    return sweep


@require_safe
def show_benchmark(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    sweep = get_benchmark(request, sweep_id)
    rows = benchmark.build_report(sweep)
    prompts = benchmark.get_prompt_set(sweep)
    jobs = (
        Job.objects.filter(kind=KIND, key__startswith=f"{prompts.pk}:")
        if prompts
        else Job.objects.none()
    )
    pending = jobs.filter(state__in=OPEN_STATES).count()
    is_over = all(row.run.state not in UNFINISHED for row in rows)
    values = {
        "sweep": sweep,
        "rows": [(row, get_run_status(row.run), benchmark.format_row(row)) for row in rows],
        "columns": benchmark.COLUMNS,
        "skipped_methods": benchmark.get_skipped_methods(sweep),
        "is_over": is_over,
        "has_requested": jobs.exists(),
        "pending": pending,
        "poll_address": "" if is_over and not pending else reverse("benchmark", args=[sweep.pk]),
        "can_change": Sweep.objects.changeable_by(request.user).filter(pk=sweep.pk).exists(),
        "versions": [row.version for row in rows if row.version],
    }
    return render(
        request,
        "adapters/_benchmark.html"
        if request.headers.get("HX-Request")
        else "adapters/benchmark.html",
        values,
    )


@require_POST
def request_replies(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    sweep = get_changeable(Sweep, request.user, sweep_id, "owner")
    benchmark.request_all_replies(request.user, get_benchmark(request, sweep.pk))
    return redirect("benchmark", sweep_id)


@require_safe
def export_report(request: AuthenticatedRequest, sweep_id: int) -> HttpResponse:
    """The report as Markdown with `?as=md`, else as CSV."""
    sweep = get_benchmark(request, sweep_id)
    rows = benchmark.build_report(sweep)
    extension = "md" if request.GET.get("as") == "md" else "csv"
    text, content_type = (
        (benchmark.format_markdown(sweep, rows), "text/markdown")
        if extension == "md"
        else (benchmark.format_csv(sweep, rows), "text/csv")
    )
    response = HttpResponse(text, content_type=content_type)
    response["Content-Disposition"] = f'attachment; filename="benchmark-{sweep.pk}.{extension}"'
    return response
