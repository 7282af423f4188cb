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
from training.people.requests import AuthenticatedRequest
from training.runs.forecast import token_lengths
from training.runs.forecast.memory_estimators import CannotEstimate, get_estimator
from training.runs.launch import auto_form, form
from training.runs.launch.form_input import LaunchInput, read_launch_form, read_selection
from training.runs.launch.request import preview_launch
from training.runs.launch.selection import FORM_FIELDS, Selection
from training.runs.launch.sweep import compute_warning_id, expand_grid


@require_POST
def show_summary(request: AuthenticatedRequest) -> HttpResponse:
    """The card beside the form, for what the form says at this moment; with Auto, the plan comes
    along.
    """
    launch_input = read_launch_form(request)
    values = {
        **build_summary_context(launch_input),
        "auto": launch_input.is_auto,
        "plan_state": launch_input.plan_state,
        "is_partial": True,
    }
    return render(request, "runs/_card.html", values)


def build_summary_context(launch_input: LaunchInput) -> dict[str, Any]:
    """What will happen, or the next thing that is missing."""
    values, model, version = (
        launch_input.values,
        launch_input.selection.model,
        launch_input.selection.version,
    )
    context: dict[str, Any] = {"missing": "", "count": 1}
    context |= {"model": model, "version": version, "method": METHODS[form.get_method_name(values)]}
    plan_state = launch_input.plan_state if launch_input.is_auto else None
    if plan_state and plan_state.plan is None and model and version:
        problem = plan_state.problem
        missing = f"Correct {form.format_title(problem.field)}" if problem else "Planning…"
        return context | {
            "problem": problem,
            "missing": missing,
            "pending_step": plan_state.pending_step,
        }
    try:
        grid, members, _ = expand_grid(values)
        context |= {"config": members[0].config, "count": len(members), "grid": grid}
        if model is None or version is None:
            return context | {"missing": format_missing_choice(launch_input)}
        # The digest is the launch's business: a plan that changed is shown here, anew.
        request = replace(launch_input.to_launch_request(), plan_digest=None)
        plan, target = plan_state.plan if plan_state else None, launch_input.selection.target
        launch_preview = preview_launch(request, plan=plan, target=target, wait=False)
    except UserError as problem:
        return context | {"problem": problem, "missing": format_correction(problem)}
    forecast = launch_preview.forecast
    forecast["warnings"] = [
        (warning, compute_warning_id(warning)) for warning in forecast["warnings"]
    ]
    return context | {"forecast": forecast, "is_measured": launch_preview.is_measured}


def format_correction(problem: UserError) -> str:
    if isinstance(problem, CannotEstimate):
        return "Choose another technique"
    if problem.field == "data":
        return "Choose another model or data"
    return f"Correct {form.format_title(problem.field)}"


def format_missing_choice(launch_input: LaunchInput) -> str:
    if launch_input.selection.model is None:
        return "Choose a model" if launch_input.selection.version else "Choose model and data"
    return "Choose data"


def measure_lengths(request: AuthenticatedRequest) -> HttpResponse:
    """Count the tokens of the chosen data with the chosen model; the card asks for this when nobody
    has yet.
    """
    selection = Selection(request.user, {name: request.GET.get(name, "") for name in FORM_FIELDS})
    model, version = selection.require_model(), selection.require_data()
    try:
        token_lengths.get_lengths(
            version, model, train_on_prompt=request.GET.get("train_on_prompt") == "on"
        )
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer


@require_POST
def simulate_memory(request: AuthenticatedRequest) -> HttpResponse:
    """Simulate steps of what the form says; the card asks for this when memory laws are missing for
    it, or for the plan.
    """
    selection = read_selection(request)
    try:
        model, _ = selection.require_model(), selection.require_data()
        if request.POST.get("mode") == "auto":
            problem = auto_form.build_plan_state(request.POST, selection, wait=True).problem
            # Any other problem is shown by the card.
            if auto_form.build_plan_state(request.POST, selection).pending_step == "memory":
                raise problem or UserError(
                    "The memory forecast broke off; the log of the web server says why."
                )
        else:
            _, members, _ = expand_grid(form.parse_form_settings(request.POST))
            get_estimator(model.folder, members[0].config, selection.target.kind)
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer
