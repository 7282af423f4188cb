"""The summary card of the launch page, and the requests that measure or simulate what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST, require_safe

from training.engine.methods import METHODS
from training.errors import UserError
from training.people.requests import AuthenticatedRequest
from training.runs.forecast import token_lengths
from training.runs.forecast.memory_estimators import CannotEstimate, get_estimator
from training.runs.launch import auto_form, settings_form
from training.runs.launch.form_input import LaunchInput, read_launch_form, read_selection
from training.runs.launch.request import preview_launch
from training.runs.launch.selection import FORM_FIELDS, Selection
from training.runs.launch.sweep import compute_warning_id, expand_grid


@require_POST
def show_summary(request: AuthenticatedRequest) -> HttpResponse:
    """The summary card for the current content of the form. With Auto it includes the plan as an
    out-of-band swap.
    """
    launch_input = read_launch_form(request)
    values = build_summary_context(launch_input)
    problem = values.get("problem")
    # A wrong value stays in its row of the plan
    is_replanned = not problem or problem.field in ("data", "model")
    values |= {
        "auto": launch_input.is_auto,
        "plan_state": launch_input.plan_state,
        "has_plan_card": launch_input.is_auto and is_replanned,
    }
    return render(request, "runs/_summary.html", values)


def build_summary_context(launch_input: LaunchInput) -> dict[str, Any]:
    """The forecast of the launch, or the next input or step that is missing."""
    values, model, version = (
        launch_input.values,
        launch_input.selection.model,
        launch_input.selection.version,
    )
    context: dict[str, Any] = {"missing": "", "count": 1}
    context |= {
        "model": model,
        "version": version,
        "method": METHODS[settings_form.get_method_name(values)],
    }
    plan_state = launch_input.plan_state if launch_input.is_auto else None
    if plan_state and plan_state.plan is None and model and version:
        problem = plan_state.problem
        missing = f"Fix {settings_form.format_title(problem.field)}" if problem else "Planning…"
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
        # Only the launch checks the digest. The summary always shows the current plan.
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
    """The start button's label while there is a problem."""
    if isinstance(problem, CannotEstimate):
        return "Choose another method"
    if problem.field == "data":
        return "Choose another model or data"
    return f"Fix {settings_form.format_title(problem.field)}"


def format_missing_choice(launch_input: LaunchInput) -> str:
    """The start button's label while the model or the data is not chosen."""
    if launch_input.selection.model is None:
        return "Choose a model" if launch_input.selection.version else "Choose model and data"
    return "Choose data"


@require_safe
def measure_lengths(request: AuthenticatedRequest) -> HttpResponse:
    """Measure the token lengths of the selected data with the selected model. The summary card
    requests this if they are not cached.
    """
    selection = Selection(request.user, {name: request.GET.get(name, "") for name in FORM_FIELDS})
    model, version = selection.require_model(), selection.require_data()
    try:
        token_lengths.get_lengths(
            version, model, train_on_prompt=request.GET.get("train_on_prompt") == "on"
        )
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    response = HttpResponse(status=204)
    response["HX-Trigger"] = "measured"
    return response


@require_POST
def simulate_memory(request: AuthenticatedRequest) -> HttpResponse:
    """Fit the memory estimators of the form's settings or of its plan. The summary card requests
    this if they are not cached.
    """
    selection = read_selection(request)
    try:
        model, _ = selection.require_model(), selection.require_data()
        if request.POST.get("mode") == "auto":
            problem = auto_form.build_plan_state(request.POST, selection, wait=True).problem
            # The summary card shows any other problem.
            if auto_form.build_plan_state(request.POST, selection).pending_step == "memory":
                raise problem or UserError("The memory forecast failed. See the web server's log.")
        else:
            _, members, _ = expand_grid(settings_form.parse_form_settings(request.POST))
            get_estimator(model.folder, members[0].config, selection.target.kind)
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    response = HttpResponse(status=204)
    response["HX-Trigger"] = "measured"
    return response
