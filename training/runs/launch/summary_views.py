"""The card beside the launch form: what will happen, and what has to be counted or simulated before
it can be told.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.errors import UserError
from training.people.requests import SignedIn
from training.runs.forecast import token_lengths
from training.runs.forecast.memory_estimators import law
from training.runs.forecast.summary import forecast
from training.runs.launch import auto_form, form, sweep
from training.runs.launch.form_input import Asked, picked_in, posted
from training.runs.launch.selection import NAMES, Picked


@require_POST
def card(request: SignedIn) -> HttpResponse:
    """The card beside the form, for what the form says at this moment; with Auto, the plan comes
    along.
    """
    asked = posted(request)
    values = {**card_values(asked), "auto": asked.auto, "planned": asked.planned, "beside": True}
    return render(request, "runs/_card.html", values)


def card_values(asked: Asked) -> dict[str, Any]:
    """What will happen, or the next thing that is missing."""
    values, model, version = asked.values, asked.picked.model, asked.picked.version
    said: dict[str, Any] = {"missing": "", "count": 1}
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
    found = token_lengths.kept_lengths(version, model, train_on_prompt=config.train_on_prompt)
    try:
        warnings = sweep.warnings_of(everyone, model, version)
    except UserError as problem:
        return said | {"problem": problem, "missing": "Choose another model or data"}
    try:
        will = forecast(config, model, version, found, asked.picked.target)
    except UserError as problem:  # this technique does not fit the model
        return said | {"problem": problem, "missing": "Choose another technique"}
    will["warnings"] = [(words, sweep.mark(words)) for words in warnings]
    return said | {"will": will, "measured": found is not None}


def measured(request: SignedIn) -> HttpResponse:
    """Count the tokens of the chosen data with the chosen model; the card asks for this when nobody
    has yet.
    """
    picked = Picked(request.user, {name: request.GET.get(name, "") for name in NAMES})
    model, version = picked.must_have_model(), picked.must_have_data()
    try:
        token_lengths.lengths(
            version, model, train_on_prompt=request.GET.get("train_on_prompt") == "on"
        )
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer


@require_POST
def memory(request: SignedIn) -> HttpResponse:
    """Simulate steps of what the form says; the card asks for this when memory laws are missing for
    it, or for the plan.
    """
    picked = picked_in(request)
    try:
        model, _ = picked.must_have_model(), picked.must_have_data()
        if request.POST.get("mode") == "auto":
            problem = auto_form.planned(request.POST, picked, wait=True).problem
            if (
                auto_form.planned(request.POST, picked).waits_for == "memory"
            ):  # else a problem is shown by the card
                raise problem or UserError(
                    "The memory forecast broke off; the log of the web server says why."
                )
        else:
            config = RunConfig.from_dict(sweep.members(form.settings_from(request.POST))[0])
            law(model.folder, config, picked.target.kind)
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer
