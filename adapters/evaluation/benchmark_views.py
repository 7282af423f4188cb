"""The bake-off: a form that starts a run of every method, and the report that comes of it, on the
page, as CSV and Markdown.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from adapters.evaluation import benchmark
from adapters.evaluation.replies import KIND
from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Dataset, DatasetVersion
from training.datasets.visible import visible_data
from training.engine.methods import METHODS
from training.errors import NotFound, UserError
from training.jobs.models import OPEN_STATES, Job
from training.people.requests import SignedIn, number
from training.people.visible import get_changeable, get_visible
from training.runs.models import Sweep
from training.runs.states import OPEN
from training.runs.status import describe

MOST_CHOICES = 200


def new(request: SignedIn) -> HttpResponse:
    if request.method == "POST":
        try:
            return redirect("bakeoff", launch(request).pk)
        except UserError as error:
            return render(
                request,
                "adapters/bakeoff_new.html",
                {**choices(request), "error": error},
                status=error.status,
            )
    return render(request, "adapters/bakeoff_new.html", choices(request))


def choices(request: SignedIn) -> dict[str, Any]:
    mine = Dataset.objects.visible_to(request.user).values("pk")
    return {
        "bases": BaseModel.objects.filter(state=ModelState.READY),
        "datas": DatasetVersion.objects.filter(dataset__in=mine)
        .select_related("dataset")
        .order_by("-pk")[:MOST_CHOICES],
        "budget": benchmark.Budget(),
        "given": request.POST or request.GET,
        "methods": [METHODS[name].title for name in benchmark.BENCHMARK_METHODS],
    }


def launch(request: SignedIn) -> Sweep:
    base = BaseModel.objects.filter(pk=number(request.POST.get("model", ""))).first()
    data = visible_data(request.user, number(request.POST.get("data", "")))
    if base is None or data is None:
        raise NotFound(
            "Choose a base model and data that you may see.", field="data" if base else "model"
        )
    usual = benchmark.Budget()
    given = {
        name: number(request.POST.get(name, "")) or getattr(usual, name)
        for name in ("max_steps", "max_tokens_per_batch", "max_length")
    }
    return benchmark.launch_bakeoff(
        request.user, base, data, benchmark.Budget(**given), name=request.POST.get("name", "")
    )


def seen(request: SignedIn, sweep_id: int) -> Sweep:
    """Raises NotFound: not there, not theirs to see, or another sweep than a bake-off."""
    found = get_visible(Sweep, request.user, sweep_id, "owner")
    if not benchmark.is_bakeoff(found):
        raise NotFound(f"Sweep {sweep_id} is no bake-off.")
    return found


def show(request: SignedIn, sweep_id: int) -> HttpResponse:
    found = seen(request, sweep_id)
    rows = benchmark.report(found)
    asked = benchmark.prompts_of(found)
    tasks = (
        Job.objects.filter(kind=KIND, key__startswith=f"{asked.pk}:")
        if asked
        else Job.objects.none()
    )
    pending = tasks.filter(state__in=OPEN_STATES).count()
    over = all(row.run.state not in OPEN for row in rows)
    values = {
        "sweep": found,
        "rows": [(row, describe(row.run), benchmark.cells(row)) for row in rows],
        "columns": benchmark.COLUMNS,
        "left_out": benchmark.left_out(found),
        "over": over,
        "asked": tasks.exists(),
        "pending": pending,
        "moving": not over or pending,
        "mine": Sweep.objects.changeable_by(request.user).filter(pk=found.pk).exists(),
        "versions": [row.version for row in rows if row.version],
    }
    return render(
        request,
        "adapters/_bakeoff.html" if request.headers.get("HX-Request") else "adapters/bakeoff.html",
        values,
    )


@require_POST
def ask(request: SignedIn, sweep_id: int) -> HttpResponse:
    found = get_changeable(Sweep, request.user, sweep_id, "owner")
    benchmark.ask_all(request.user, seen(request, found.pk))
    return redirect("bakeoff", sweep_id)


def export(request: SignedIn, sweep_id: int) -> HttpResponse:
    """`?as=md` for Markdown, else CSV."""
    found = seen(request, sweep_id)
    rows = benchmark.report(found)
    ending = "md" if request.GET.get("as") == "md" else "csv"
    text, kind = (
        (benchmark.as_markdown(found, rows), "text/markdown")
        if ending == "md"
        else (benchmark.as_csv(found, rows), "text/csv")
    )
    answer = HttpResponse(text, content_type=kind)
    answer["Content-Disposition"] = f'attachment; filename="bake-off-{found.pk}.{ending}"'
    return answer
