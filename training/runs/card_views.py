"""The card beside the launch form: what will happen, and what has to be counted or simulated before it can be told."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from training.datasets.visible import visible_data
from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.errors import UserError
from training.people.requests import SignedIn, number
from training.runs import form, measure, plan_form, sweep
from training.runs.asked import CHOSEN, Asked, chosen_model, chosen_version, posted, ready_model
from training.runs.device import device_kind
from training.runs.forecast import forecast
from training.runs.laws import law


@require_POST
def card(request: SignedIn) -> HttpResponse:
    """The card beside the form, for what the form says at this moment; with Auto, the plan comes along."""
    asked = posted(request)
    values = {**card_values(request, asked), "auto": asked.auto, "planned": asked.planned, "beside": True}
    return render(request, "runs/_card.html", values)


def card_values(request: SignedIn, asked: Asked) -> dict[str, Any]:
    """What will happen, or the next thing that is missing."""
    chosen, values = asked.chosen, asked.values
    said: dict[str, Any] = {"missing": "", "count": 1}
    model, version = ready_model(chosen["model"]), visible_data(request.user, number(chosen["data"]))
    said |= {"model": model, "version": version, "method": TABLE[form.method_of(values)]}
    if asked.auto and asked.planned and asked.planned.plan is None and model and version:
        problem = asked.planned.problem
        missing = f"Correct {form.title(problem.field)}" if problem else "Planning…"
        return said | {"problem": problem, "missing": missing, "waits_for": asked.planned.waits_for}
    try:
        everyone = sweep.members(values)
        config = RunConfig.from_dict(everyone[0])
    except UserError as problem:
        return said | {"problem": problem, "missing": f"Correct {form.title(problem.field)}"}
    said |= {"config": config, "count": len(everyone), "grid": sweep.split_grid(values)[1]}
    if model is None or version is None:
        nothing = "Choose model and data" if model is None and version is None else ""
        return said | {"missing": nothing or ("Choose a model" if model is None else "Choose data")}
    found = measure.kept_lengths(version, model, train_on_prompt=config.train_on_prompt)
    try:
        warnings = sweep.warnings_of(everyone, model, version)
    except UserError as problem:
        return said | {"problem": problem, "missing": "Choose another model or data"}
    try:
        will = forecast(config, model, version, found)
    except UserError as problem:  # this technique does not fit the model
        return said | {"problem": problem, "missing": "Choose another technique"}
    will["warnings"] = [(words, sweep.mark(words)) for words in warnings]
    return said | {"will": will, "measured": found is not None}


def measured(request: SignedIn) -> HttpResponse:
    """Count the tokens of the chosen data with the chosen model; the card asks for this when nobody has yet."""
    model, version = chosen_model(request.GET.get("model", "")), chosen_version(request, request.GET.get("data", ""))
    try:
        measure.lengths(version, model, train_on_prompt=request.GET.get("train_on_prompt") == "on")
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer


@require_POST
def memory(request: SignedIn) -> HttpResponse:
    """Simulate steps of what the form says; the card asks for this when memory laws are missing for it, or for the plan."""
    chosen = {name: request.POST.get(name, "") for name in CHOSEN}
    try:
        model, version = chosen_model(chosen["model"]), chosen_version(request, chosen["data"])
        if request.POST.get("mode") == "auto":
            problem = plan_form.planned(request.POST, model, version, wait=True).problem
            if plan_form.planned(request.POST, model, version).waits_for == "memory":  # else a problem is shown by the card
                raise problem or UserError("The memory forecast broke off; the log of the web server says why.")
        else:
            config = RunConfig.from_dict(sweep.members(form.settings_from(request.POST))[0])
            law(model.folder, config, device_kind())
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer
