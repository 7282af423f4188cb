"""The launch page, its plan and its card, and runs from files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.auto.situation import GOALS, Plan
from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Dataset
from training.errors import Conflict, UserError
from training.gpus.models import Pool
from training.people.requests import SignedIn, number
from training.people.visible import get_visible
from training.runs.forecast import token_lengths
from training.runs.launch import form, services, sweep, yaml_file
from training.runs.launch.auto import launch_planned
from training.runs.launch.form_input import Asked, posted, with_plan
from training.runs.launch.method_costs import costs as costs_of
from training.runs.launch.method_costs import make_one_missing
from training.runs.launch.selection import NAMES, Picked
from training.runs.launch.summary_views import card_values
from training.runs.models import MAX_NAME, Run
from training.runs.states import Priority


def new(request: SignedIn) -> HttpResponse:
    """The launch page. `?from=ID` copies everything of a run."""
    source = number(request.GET.get("from", ""))
    copied = get_visible(Run, request.user, source) if source else None
    texts = dict.fromkeys(NAMES, "") | {"data": request.GET.get("data", "")}
    if copied:
        name = f"{copied.name} again"[:MAX_NAME]
        texts |= {"model": str(copied.base_model_id), "data": str(copied.data_id), "name": name}
        texts |= {"pool": str(copied.pool_id or ""), "priority": copied.priority}
    asked = Asked(Picked(request.user, texts), copied.config if copied else {}, auto=copied is None)
    error = None
    if request.method == "POST":
        asked = posted(request)
        try:
            return start(request, asked)
        except UserError as problem:
            error = problem
    return page(request, asked, error)


@require_POST
def from_file(request: SignedIn) -> HttpResponse:
    """The launch page filled from a run's YAML file; nothing is started."""
    uploaded = request.FILES.get("file")
    chosen, values, error = dict.fromkeys(NAMES, ""), {}, None
    try:
        if uploaded is None:
            raise UserError("Choose a YAML file first.", field="file")
        described = yaml_file.read_yaml(
            uploaded.read(4 * yaml_file.MAX_CHARACTERS + 1).decode("utf-8", errors="replace")
        )
        sweep.members(described["settings"])
        refuse_words(described["settings"])
        values = described["settings"]
        chosen["name"] = described["name"][:MAX_NAME]
        chosen["model"] = str(yaml_file.find_model(described).pk)
        chosen["data"] = str(yaml_file.find_data(request.user, described).pk)
        where = yaml_file.find_where(described)
        chosen |= {"pool": str(where.pool.pk) if where.pool else "", "priority": where.priority}
        if described.get("auto") is not None:
            raise UserError(
                "This file lets Auto choose; start it with `manage.py launch`, or choose Auto "
                "here.",
                field="file",
            )
    except UserError as problem:
        error = problem
    return page(request, Asked(Picked(request.user, chosen), values, auto=False), error)


def refuse_words(values: dict[str, Any]) -> None:
    """Raises UserError: several values of a setting that the page offers one of; it would start
    less than the file says.
    """
    for name, field in form.fields({}).items():
        if isinstance(values.get(name), list) and field.kind not in ("int", "float"):
            raise UserError(
                f"{name} has several values; start this file with `manage.py launch`, or POST it "
                "to the API.",
                field=name,
            )


def start(request: SignedIn, asked: Asked) -> HttpResponse:
    """Launch a run, or a sweep if a setting has several values.

    Raises:
        Unwise: there are warnings that the person has not seen.
        Conflict: the plan is another one than that on the screen.
    """
    picked = asked.picked
    model, version = picked.must_have_model(), picked.must_have_data()
    plan = plan_to_start(request, asked)
    said: dict[str, Any] = {
        "base_model": model,
        "data": version,
        "name": picked.texts["name"],
        "where": picked.where(),
    }
    fixed, grid = sweep.split_grid(asked.values)
    warnings = sweep.warnings_of(sweep.members(asked.values), model, version)
    unseen = [words for words in warnings if sweep.mark(words) not in request.POST.getlist("seen")]
    if unseen:
        raise services.Unwise(unseen)
    if grid:
        return redirect("sweep", sweep.launch_sweep(request.user, **said, settings=asked.values).pk)
    if plan:
        return redirect("run", launch_planned(request.user, plan, **said).pk)
    return redirect("run", services.launch_run(request.user, **said, settings=fixed).pk)


def plan_to_start(request: SignedIn, asked: Asked) -> Plan | None:
    """Raises UserError: there is no plan; Conflict: free memory or data changed it since it was
    shown.
    """
    if not asked.auto or asked.planned is None:
        return None
    if asked.planned.problem:
        raise asked.planned.problem
    if asked.planned.plan is None:
        raise Conflict("The plan is still being made; look at it, then start.", field="plan")
    if request.POST.get("plan") != asked.planned.mark:
        raise Conflict(
            "The plan changed since it was shown, as memory or a lock did; look at it again, then "
            "start.",
            field="plan",
        )
    return asked.planned.plan


def page(request: SignedIn, asked: Asked, error: UserError | None) -> HttpResponse:
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
        asked.picked.texts
        | {name: pk for name, pk in only.items() if not asked.picked.texts[name]},
    )
    asked = (
        with_plan(request, picked)
        if asked.auto and asked.planned is None
        else replace(asked, picked=picked)
    )
    shown = {
        **offered,
        "versions": versions,
        "chosen": picked.texts,
        "pools": Pool.objects.all(),
        "classes": Priority.choices
        if request.user.is_superuser
        else [one for one in Priority.choices if one[0] != Priority.URGENT],
        "error": error,
        **shown_settings(request, asked),
        "open_fold": error is not None
        and getattr(form.fields({}).get(error.field), "advanced", False),
        **card_values(asked),
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
    asked = posted(request)
    if not asked.auto and request.POST.get("mode-was") == "auto":
        asked = Asked(asked.picked, posted(request, mode="auto").values, auto=False)
    elif not asked.auto:
        asked = Asked(asked.picked, form.follow_method(asked.values), auto=False)
    answer = render(request, "runs/_how.html", shown_settings(request, asked))
    answer["HX-Trigger-After-Swap"] = "measured"  # the card reads the form anew
    return answer


@require_POST
def costs(request: SignedIn) -> HttpResponse:
    """The techniques with their cost, after one that is missing was simulated (`look`: as they
    are).
    """
    asked = posted(request)
    model, error = asked.picked.model, None
    if model and "look" not in request.GET:
        try:
            make_one_missing(model, asked.values, asked.picked.target.kind)
        except UserError as problem:
            error = problem
    shown = {**techniques_shown(asked), "chosen_method": form.method_of(asked.values)}
    return render(
        request, "runs/_techniques.html", shown | ({"simulating": False} if error else {})
    )


def techniques_shown(asked: Asked) -> dict[str, Any]:
    """What the technique cards show; `simulating`: some costs are still missing."""
    model, version = asked.picked.model, asked.picked.version
    found = token_lengths.kept_lengths(version, model) if model and version else None
    known = costs_of(model, found, asked.values, asked.picked.target)
    return {"techniques": known, "simulating": any(cost.waits for cost in known.values())}


def shown_settings(request: SignedIn, asked: Asked) -> dict[str, Any]:
    return {
        "auto": asked.auto,
        "planned": asked.planned,
        "goals": GOALS,
        "groups": form.groups(asked.values, advanced=False),
        "advanced": form.groups(asked.values, advanced=True),
        "cannot": form.cannot(asked.values),
        **({} if asked.auto else techniques_shown(asked)),
        "chosen_method": form.method_of(asked.values),
    }
