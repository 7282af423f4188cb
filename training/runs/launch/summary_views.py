"""The card beside the launch form: what will happen, and what has to be counted or simulated before
it can be told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from training.engine.methods import METHODS
from training.errors import UserError
from training.people.requests import SignedIn
from training.runs.forecast import token_lengths
from training.runs.forecast.memory_estimators import Unlawful, law
from training.runs.launch import auto_form, form
from training.runs.launch.form_input import LaunchInput, picked_in, posted
from training.runs.launch.request import preview
from training.runs.launch.selection import NAMES, Picked
from training.runs.launch.sweep import expand_grid, warning_id


@require_POST
def card(request: SignedIn) -> HttpResponse:
    """The card beside the form, for what the form says at this moment; with Auto, the plan comes
    along.
    """
    entered = posted(request)
    values = {
        **card_values(entered),
        "auto": entered.auto,
        "planned": entered.planned,
        "beside": True,
    }
    return render(request, "runs/_card.html", values)


def card_values(entered: LaunchInput) -> dict[str, Any]:
    """What will happen, or the next thing that is missing."""
    values, model, version = entered.values, entered.picked.model, entered.picked.version
    known: dict[str, Any] = {"missing": "", "count": 1}
    known |= {"model": model, "version": version, "method": METHODS[form.method_of(values)]}
    planned = entered.planned if entered.auto else None
    if planned and planned.plan is None and model and version:
        problem = planned.problem
        missing = f"Correct {form.title(problem.field)}" if problem else "Planning…"
        return known | {"problem": problem, "missing": missing, "waits_for": planned.waits_for}
    try:
        grid, members, _ = expand_grid(values)
        known |= {"config": members[0].config, "count": len(members), "grid": grid}
        if model is None or version is None:
            return known | {"missing": missing_choice(entered)}
        # The digest is the launch's business: a plan that changed is shown here, anew.
        request = replace(entered.to_request(), plan_digest=None)
        plan, target = planned.plan if planned else None, entered.picked.target
        shown = preview(request, plan=plan, target=target, wait=False)
    except UserError as problem:
        return known | {"problem": problem, "missing": what_to_correct(problem)}
    will = shown.forecast
    will["warnings"] = [(words, warning_id(words)) for words in will["warnings"]]
    return known | {"will": will, "measured": shown.is_measured}


def what_to_correct(problem: UserError) -> str:
    if isinstance(problem, Unlawful):
        return "Choose another technique"
    if problem.field == "data":
        return "Choose another model or data"
    return f"Correct {form.title(problem.field)}"


def missing_choice(entered: LaunchInput) -> str:
    if entered.picked.model is None:
        return "Choose a model" if entered.picked.version else "Choose model and data"
    return "Choose data"


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
            # Any other problem is shown by the card.
            if auto_form.planned(request.POST, picked).waits_for == "memory":
                raise problem or UserError(
                    "The memory forecast broke off; the log of the web server says why."
                )
        else:
            _, members, _ = expand_grid(form.settings_from(request.POST))
            law(model.folder, members[0].config, picked.target.kind)
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer
