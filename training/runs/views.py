"""The Runs pages: list, launch, one run live, and what people do to it."""

from __future__ import annotations

from typing import Any

from django.core.paginator import Paginator
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Dataset, DatasetVersion
from training.datasets.visible import visible_data
from training.errors import NotFound, UserError, one_line
from training.people.requests import SignedIn
from training.people.visible import get_visible
from training.runs import files, form, launch, stream
from training.runs.models import Event, Run
from training.runs.state_words import describe
from training.runs.states import ENDED, OPEN, State

RUNS_A_PAGE = 50
LOG_LINES = 300
CHART_POINTS = 600  # twice as many line points: about one for each pixel of a wide screen


def runs(request: SignedIn) -> HttpResponse:
    rows = Run.objects.visible_to(request.user).select_related("owner", "base_model", "data__dataset")
    state, text = request.GET.get("state", ""), one_line(request.GET.get("q", ""))[:100]
    if state in State.values:
        rows = rows.filter(state=state)
    if text:
        rows = rows.filter(name__icontains=text)
    page = Paginator(rows.defer("config", "plan"), RUNS_A_PAGE).get_page(request.GET.get("page"))
    values = {
        "page": page,
        "described": [(run, describe(run)) for run in page],
        "states": State.choices,
        "state": state,
        "q": text,
        "filtered": bool(state or text),
        "has_data": Dataset.objects.visible_to(request.user).exists(),
        "moving": any(run.state in OPEN for run in page),
    }
    template = "runs/_table.html" if request.headers.get("HX-Request") else "runs/runs.html"
    return render(request, template, values)


def new(request: SignedIn) -> HttpResponse:
    """The launch page. `?from=ID` copies a run's model, data and settings."""
    source = number(request.GET.get("from", ""))
    copied = get_visible(Run, request.user, source) if source else None
    values: dict[str, Any] = copied.config if copied else {}
    chosen = {
        "model": str(copied.base_model_id) if copied else "",
        "data": str(copied.data_id) if copied else request.GET.get("data", ""),
        "name": f"{copied.name} again"[: launch.MAX_NAME] if copied else "",
    }
    error = None
    if request.method == "POST":
        chosen = {name: request.POST.get(name, "") for name in chosen}
        values = form.settings_from(request.POST)
        try:
            return redirect("run", start(request, chosen, values).pk)
        except UserError as problem:
            error = problem
    return render(
        request,
        "runs/new.html",
        launch_page(request, chosen, values, error),
        status=error.status if error else 200,
    )


def start(request: SignedIn, chosen: dict[str, str], values: dict[str, Any]) -> Run:
    model = BaseModel.objects.filter(pk=number(chosen["model"])).first()
    if model is None:
        raise NotFound("Choose a base model.", field="model")
    return launch.launch_run(
        request.user,
        base_model=model,
        data=visible_version(request, chosen["data"]),
        settings=values,
        name=chosen["name"],
    )


def visible_version(request: SignedIn, text: str) -> DatasetVersion:
    version = visible_data(request.user, number(text))
    if version is None:
        raise NotFound("Choose a data set.", field="data")
    return version


def number(text: str) -> int:
    """An id from an address or a form; 0, which no row has, for what is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0


def launch_page(request: SignedIn, chosen: dict[str, str], values: dict[str, Any], error: UserError | None) -> dict[str, Any]:
    datasets = Dataset.objects.visible_to(request.user).prefetch_related("versions")
    versions = [dataset.versions.all()[0] for dataset in datasets if dataset.versions.all()]
    models = list(BaseModel.objects.exclude(state=ModelState.FAILED))
    if not chosen["data"] and len(versions) == 1:
        chosen["data"] = str(versions[0].pk)
    if not chosen["model"] and len(models) == 1:
        chosen["model"] = str(models[0].pk)
    return {
        "models": models,
        "versions": versions,
        "chosen": chosen,
        "error": error,
        "groups": form.groups(values, advanced=False),
        "advanced": form.groups(values, advanced=True),
        "open_fold": error is not None and getattr(form.fields({}).get(error.field), "advanced", False),
    }


def run(request: SignedIn, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id, "owner", "team", "base_model", "data__dataset")
    adapter = getattr(found, "adapter", None) if found.state in ENDED else None
    values = {"run": found, "state": describe(found), "adapter": adapter, "snapshot": stream.snapshot(found.pk, CHART_POINTS)}
    return render(request, "runs/run.html", values)


def header(request: SignedIn, run_id: int) -> HttpResponse:
    """The part of the page that depends on the state, fetched anew when the state changes."""
    found = get_visible(Run, request.user, run_id, "owner", "base_model", "data__dataset")
    adapter = getattr(found, "adapter", None) if found.state in ENDED else None
    return render(request, "runs/_header.html", {"run": found, "state": describe(found), "adapter": adapter})


@require_POST
def stop(request: SignedIn, run_id: int) -> HttpResponse:
    launch.stop_run(get_visible(Run, request.user, run_id), discard=request.POST.get("how") == "discard")
    return redirect("run", run_id)


@require_POST
def go_on(request: SignedIn, run_id: int) -> HttpResponse:
    launch.continue_run(get_visible(Run, request.user, run_id))
    return redirect("run", run_id)


def log(request: SignedIn, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    rows = Event.objects.filter(run=found).exclude(kind__in=("step", "memory", "sample")).order_by("-seq")[:LOG_LINES]
    return render(request, "runs/_log.html", {"events": reversed(rows), "output": files.engine_output(found)})


def run_files(request: SignedIn, run_id: int) -> HttpResponse:
    found = get_visible(Run, request.user, run_id)
    return render(request, "runs/_files.html", {"run": found, "files": files.list_files(found)})
