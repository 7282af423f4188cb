"""The launch page, its plan and its card, and runs from files."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.auto.situation import GOALS
from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Dataset
from training.engine.config import RunConfig
from training.errors import Conflict, NotFound, UserError
from training.gpus.models import Pool
from training.people.requests import SignedIn, number
from training.people.visible import get_visible
from training.runs.forecast import token_lengths
from training.runs.launch import auto_form, form, yaml_file
from training.runs.launch.auto import PlanPending
from training.runs.launch.form_input import LaunchInput, posted, with_plan
from training.runs.launch.method_costs import costs as costs_of
from training.runs.launch.method_costs import make_one_missing
from training.runs.launch.request import LaunchRequest, launch
from training.runs.launch.selection import NAMES, Picked
from training.runs.launch.summary_views import card_values
from training.runs.launch.sweep import expand_grid
from training.runs.models import MAX_NAME, Run, Sweep
from training.runs.states import Priority


def new(request: SignedIn) -> HttpResponse:
    """The launch page. `?from=ID` copies everything of a run."""
    source = number(request.GET.get("from", ""))
    copied = get_visible(Run, request.user, source) if source else None
    if request.method == "POST":
        entered = posted(request)
        try:
            return start(request, entered)
        except UserError as problem:
            return page(request, entered, problem)
    texts = dict.fromkeys(NAMES, "") | {"data": request.GET.get("data", "")}
    if copied is None:
        return page(request, LaunchInput(Picked(request.user, texts), {}, auto=True), None)
    texts |= {
        "model": str(copied.base_model_id),
        "data": str(copied.data_id),
        "name": f"{copied.name} again"[:MAX_NAME],
        "pool": str(copied.pool_id or ""),
        "priority": copied.priority,
        "from_version": str(copied.from_version or ""),
    }
    return page(request, LaunchInput(Picked(request.user, texts), copied.config, auto=False), None)


@require_POST
def from_file(request: SignedIn) -> HttpResponse:
    """The launch page filled from a run's YAML file; nothing is started."""
    uploaded = request.FILES.get("file")
    texts = dict.fromkeys(NAMES, "")
    filled = LaunchInput(Picked(request.user, texts), {}, auto=False)
    error = None
    try:
        if uploaded is None:
            raise UserError("Choose a YAML file first.", field="file")
        text = uploaded.read(4 * yaml_file.MAX_CHARACTERS + 1).decode("utf-8", errors="replace")
        described = yaml_file.read_yaml(text)
        expand_grid(described["settings"])
        refuse_words(described["settings"])
        texts["name"] = described["name"][:MAX_NAME]
        filled = replace(filled, values=described["settings"])
        filled = fill_from(yaml_file.to_request(request.user, described))
    except UserError as problem:
        error = problem
    return page(request, filled, error)


def fill_from(wanted: LaunchRequest) -> LaunchInput:
    """The form as a launch request has it."""
    pool, start = wanted.placement.pool, wanted.start_weights
    texts = {
        "name": wanted.name[:MAX_NAME],
        "model": str(wanted.base_model.pk),
        "data": str(wanted.data.pk),
        "pool": str(pool.pk) if pool else "",
        "priority": wanted.placement.priority,
        "from_version": str(start.version) if start else "",
    }
    picked = Picked(wanted.user, texts)
    if wanted.auto is None:
        return LaunchInput(picked, dict(wanted.settings), auto=False)
    RunConfig.check_types(wanted.auto.locked)
    return with_plan(picked, auto_form.form_of(wanted.auto))


def refuse_words(values: dict[str, Any]) -> None:
    """Raises UserError: several values of a setting that the page offers one of; it would start
    less than the file says.
    """
    numbers = {f.name for f in dataclasses.fields(RunConfig) if str(f.type) in ("int", "float")}
    for name, value in values.items():
        if isinstance(value, list) and name not in numbers:
            raise UserError(
                f"{name} has several values; start this file with `manage.py launch`, or POST it "
                "to the API.",
                field=name,
            )


def start(request: SignedIn, entered: LaunchInput) -> HttpResponse:
    """Launch a run, or a sweep if a setting has several values.

    Raises:
        WarningsNotAccepted: there are warnings that the person has not seen.
        Conflict: there is no plan yet, or it is another one than that on the screen.
    """
    wanted = entered.to_request()
    if entered.planned and entered.planned.problem:
        raise entered.planned.problem
    try:
        made = launch(
            wanted,
            accepted_warnings=request.POST.getlist("seen"),
            plan=entered.planned.plan if entered.planned else None,
            target=entered.picked.target,
            wait=False,
        )
    except PlanPending as pending:
        raise Conflict(
            "The plan is still being made; look at it, then start.", field="plan"
        ) from pending
    return redirect("sweep" if isinstance(made, Sweep) else "run", made.pk)


def page(request: SignedIn, entered: LaunchInput, error: UserError | None) -> HttpResponse:
    datasets = Dataset.objects.visible_to(request.user).prefetch_related("versions")
    versions = [version for dataset in datasets for version in dataset.versions.all()]
    offered = offered_models()
    only = {
        name: str(some[0].pk)
        for name, some in (("data", versions), ("model", offered["models"]))
        if len(some) == 1
    }
    picked = Picked(
        request.user,
        entered.picked.texts
        | {name: pk for name, pk in only.items() if not entered.picked.texts[name]},
    )
    if entered.auto and entered.planned is None:
        entered = with_plan(picked, request.POST)
    else:
        entered = replace(entered, picked=picked)
    start_weights = None
    try:
        start_weights = picked.start_weights
    except NotFound as gone:
        error = error or gone
    classes = [one for one in Priority.choices if one[0] != Priority.URGENT]
    shown = {
        **offered,
        "versions": versions,
        "chosen": picked.texts,
        "pools": Pool.objects.all(),
        "classes": Priority.choices if request.user.is_superuser else classes,
        "start_weights": start_weights,
        "error": error,
        **shown_settings(request, entered),
        "open_fold": error is not None
        and getattr(form.fields({}).get(error.field), "advanced", False),
        **card_values(entered),
    }
    return render(request, "runs/new.html", shown, status=error.status if error else 200)


def offered_models() -> dict[str, Any]:
    """What the select of base models shows. `unready` is empty once every model can be chosen."""
    models = list(BaseModel.objects.exclude(state=ModelState.FAILED))
    unready = [f"{model.pk}-{model.state}" for model in models if model.state != ModelState.READY]
    return {"models": models, "unready": ".".join(unready)}


def model_select(request: SignedIn) -> HttpResponse:
    """The select of base models, which asks for this while a model is imported. As long as nothing
    changed it stays, so that an open list does not close.
    """
    offered = offered_models()
    if offered["unready"] == request.GET.get("unready"):
        return HttpResponse(status=204)
    chosen = {"model": request.GET.get("model", "")}
    answer = render(request, "runs/_model_select.html", {**offered, "chosen": chosen})
    answer["HX-Trigger-After-Swap"] = "measured"  # the card reads the form anew
    return answer


@require_POST
def settings(request: SignedIn) -> HttpResponse:
    """The part of the form that Auto or the technique decides. What a person turned stays; a plan's
    values are taken over.
    """
    entered = posted(request)
    if not entered.auto and request.POST.get("mode-was") == "auto":
        entered = LaunchInput(entered.picked, posted(request, mode="auto").values, auto=False)
    elif not entered.auto:
        entered = LaunchInput(entered.picked, form.follow_method(entered.values), auto=False)
    answer = render(request, "runs/_how.html", shown_settings(request, entered))
    answer["HX-Trigger-After-Swap"] = "measured"  # the card reads the form anew
    return answer


@require_POST
def costs(request: SignedIn) -> HttpResponse:
    """The techniques with their cost, after one that is missing was simulated (`look`: as they
    are).
    """
    entered = posted(request)
    model, error = entered.picked.model, None
    if model and "look" not in request.GET:
        try:
            make_one_missing(model, entered.values, entered.picked.target.kind)
        except UserError as problem:
            error = problem
    shown = {**techniques_shown(entered), "chosen_method": form.method_of(entered.values)}
    return render(
        request, "runs/_techniques.html", shown | ({"simulating": False} if error else {})
    )


def techniques_shown(entered: LaunchInput) -> dict[str, Any]:
    """What the technique cards show; `simulating`: some costs are still missing."""
    model, version = entered.picked.model, entered.picked.version
    found = token_lengths.kept_lengths(version, model) if model and version else None
    known = costs_of(model, found, entered.values, entered.picked.target)
    return {"techniques": known, "simulating": any(cost.waits for cost in known.values())}


def shown_settings(request: SignedIn, entered: LaunchInput) -> dict[str, Any]:
    return {
        "auto": entered.auto,
        "planned": entered.planned,
        "goals": GOALS,
        "groups": form.groups(entered.values, advanced=False),
        "advanced": form.groups(entered.values, advanced=True),
        "cannot": form.cannot(entered.values),
        **({} if entered.auto else techniques_shown(entered)),
        "chosen_method": form.method_of(entered.values),
    }
