"""The launch page and its parts, and filling it from a YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from training.auto.plan_types import GOALS
from training.catalog.option_sources import OFFERED_MODELS
from training.datasets.option_sources import DATASET_VERSIONS
from training.engine.config import RunConfig
from training.errors import Conflict, NotFound, UserError
from training.gpus.option_sources import POOLS
from training.people.options import Options, list_options
from training.people.permissions import get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.forecast import token_lengths
from training.runs.launch import auto_form, settings_form, yaml_file, yaml_reader
from training.runs.launch.auto import PlanPending
from training.runs.launch.form_input import LaunchInput, build_planned_input, read_launch_form
from training.runs.launch.method_costs import compute_method_costs, simulate_next_missing
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.launch.selection import FORM_FIELDS, Selection
from training.runs.launch.summary_views import build_summary_context
from training.runs.launch.sweep import expand_grid
from training.runs.models import MAX_NAME_LENGTH, Run, Sweep
from training.runs.states import Priority


@require_http_methods(["GET", "HEAD", "POST"])
def new_run(request: AuthenticatedRequest) -> HttpResponse:
    """The launch page. `?from=ID` copies all settings of a run."""
    source_id = parse_int_or_zero(request.GET.get("from", ""))
    source_run = get_visible(Run, request.user, source_id) if source_id else None
    if request.method == "POST":
        launch_input = read_launch_form(request)
        try:
            return start_launch(request, launch_input)
        except UserError as problem:
            return render_page(request, launch_input, problem)
    texts = dict.fromkeys(FORM_FIELDS, "") | {"data": request.GET.get("data", "")}
    if source_run is None:
        return render_page(
            request, LaunchInput(Selection(request.user, texts), {}, is_auto=True), None
        )
    texts |= {
        "model": str(source_run.base_model_id),
        "data": str(source_run.data_id),
        "name": f"{source_run.name} (copy)"[:MAX_NAME_LENGTH],
        "pool": str(source_run.pool_id or ""),
        "priority": source_run.priority,
        "start_version": str(source_run.start_version or ""),
    }
    return render_page(
        request, LaunchInput(Selection(request.user, texts), source_run.config, is_auto=False), None
    )


@require_POST
def fill_from_file(request: AuthenticatedRequest) -> HttpResponse:
    """The launch page filled from a run's YAML file. Nothing is started."""
    uploaded = request.FILES.get("file")
    texts = dict.fromkeys(FORM_FIELDS, "")
    launch_input = LaunchInput(Selection(request.user, texts), {}, is_auto=False)
    error = None
    try:
        if uploaded is None:
            raise UserError("Choose a YAML file first.", field="file")
        text = uploaded.read(4 * yaml_reader.MAX_CHARACTERS + 1).decode("utf-8", errors="replace")
        document = yaml_file.read_yaml(text)
        expand_grid(document["settings"])
        check_numeric_lists(document["settings"])
        texts["name"] = document["name"][:MAX_NAME_LENGTH]
        launch_input = replace(launch_input, values=document["settings"])
        launch_input = fill_from_request(yaml_file.to_launch_request(request.user, document))
    except UserError as problem:
        error = problem
    return render_page(request, launch_input, error)


def fill_from_request(launch_request: LaunchRequest) -> LaunchInput:
    """The form content for a launch request."""
    pool, start = launch_request.placement.pool, launch_request.start_version
    texts = {
        "name": launch_request.name[:MAX_NAME_LENGTH],
        "model": str(launch_request.base_model.pk),
        "data": str(launch_request.data.pk),
        "pool": str(pool.pk) if pool else "",
        "priority": launch_request.placement.priority,
        "start_version": str(start.version) if start else "",
    }
    selection = Selection(launch_request.user, texts)
    if launch_request.auto is None:
        return LaunchInput(selection, dict(launch_request.settings), is_auto=False)
    RunConfig.check_types(launch_request.auto.locked)
    return build_planned_input(selection, auto_form.build_form_data(launch_request.auto))


def check_numeric_lists(values: dict[str, Any]) -> None:
    """Raises UserError: a setting that is not numeric has several values, which the form cannot
    show.
    """
    numbers = {f.name for f in dataclasses.fields(RunConfig) if str(f.type) in ("int", "float")}
    for name, value in values.items():
        if isinstance(value, list) and name not in numbers:
            raise UserError(
                f"{name} has several values, which this page cannot show. Use `manage.py launch` "
                "or the API.",
                field=name,
            )


def start_launch(request: AuthenticatedRequest, launch_input: LaunchInput) -> HttpResponse:
    """Launch a run, or a sweep if a setting has several values.

    Raises:
        WarningsNotAccepted: there are warnings that the page has not shown.
        Conflict: there is no plan yet, or it differs from the one that the page has shown.
    """
    launch_request = launch_input.to_launch_request()
    if launch_input.plan_state and launch_input.plan_state.problem:
        raise launch_input.plan_state.problem
    try:
        launched = launch_runs(
            launch_request,
            accepted_warnings=request.POST.getlist("accepted_warnings"),
            plan=launch_input.plan_state.plan if launch_input.plan_state else None,
            target=launch_input.selection.target,
            wait=False,
        )
    except PlanPending as pending:
        raise Conflict(
            "The plan is not ready yet. Review it, then start.", field="plan_digest"
        ) from pending
    return redirect("sweep" if isinstance(launched, Sweep) else "run", launched.pk)


def render_page(
    request: AuthenticatedRequest, launch_input: LaunchInput, error: UserError | None
) -> HttpResponse:
    """The launch page. The model and the data are preselected if there is only one."""
    texts = dict(launch_input.selection.texts)
    options = {
        name: list_options(request.user, source, texts[name])
        for name, source in (
            ("data", DATASET_VERSIONS),
            ("model", OFFERED_MODELS),
            ("pool", POOLS),
        )
    }
    for name in ("data", "model"):
        if not texts[name] and len(options[name].rows) == 1:
            texts[name] = options[name].rows[0].value
            options[name] = options[name].select(texts[name])
    selection = Selection(request.user, texts)
    if launch_input.is_auto and launch_input.plan_state is None:
        launch_input = build_planned_input(selection, request.POST)
    else:
        launch_input = replace(launch_input, selection=selection)
    start_version = None
    try:
        start_version = selection.start_version
    except NotFound as not_found:
        error = error or not_found
    priorities = [choice for choice in Priority.choices if choice[0] != Priority.URGENT]
    context = {
        "options": options,
        "unready": describe_unready(options["model"]),
        "chosen": selection.texts,
        "priorities": Priority.choices if request.user.is_superuser else priorities,
        "start_version": start_version,
        "error": error,
        **build_settings_context(request, launch_input),
        "open_fold": error is not None
        and getattr(settings_form.build_fields({}).get(error.field), "advanced", False),
        **build_summary_context(launch_input),
    }
    return render(request, "runs/new.html", context, status=error.status if error else 200)


def describe_unready(models: Options) -> str:
    """The offered models that are not ready, with their states. Empty once every model is."""
    return ".".join(
        f"{one.value}-{one.unavailable_reason}" for one in models.rows if one.unavailable_reason
    )


@require_safe
def refresh_model_select(request: AuthenticatedRequest) -> HttpResponse:
    """The select of base models, which polls while a model is imported. Responds with 204 if
    nothing has changed, so that an open list does not close.
    """
    models = list_options(request.user, OFFERED_MODELS, request.GET.get("model", ""))
    unready = describe_unready(models)
    if unready == request.GET.get("unready"):
        return HttpResponse(status=204)
    context = {"options": {"model": models}, "unready": unready}
    response = render(request, "runs/_model_select.html", context)
    response["HX-Trigger-After-Swap"] = "measured"  # refreshes the summary card
    return response


@require_POST
def update_settings(request: AuthenticatedRequest) -> HttpResponse:
    """The settings part of the form after a change of mode or method. Changed values are kept; a
    switch from Auto to Manual keeps the values of the plan.
    """
    launch_input = read_launch_form(request)
    if not launch_input.is_auto and request.POST.get("mode-was") == "auto":
        launch_input = LaunchInput(
            launch_input.selection, read_launch_form(request, mode="auto").values, is_auto=False
        )
    elif not launch_input.is_auto:
        launch_input = LaunchInput(
            launch_input.selection, settings_form.switch_method(launch_input.values), is_auto=False
        )
    response = render(
        request, "runs/_settings_form.html", build_settings_context(request, launch_input)
    )
    response["HX-Trigger-After-Swap"] = "measured"  # refreshes the summary card
    return response


@require_POST
def refresh_method_costs(request: AuthenticatedRequest) -> HttpResponse:
    """The methods with their memory forecasts, after simulating one that is missing (without
    `?cached_only`).
    """
    launch_input = read_launch_form(request)
    model, error = launch_input.selection.model, None
    if model and "cached_only" not in request.GET:
        try:
            simulate_next_missing(model, launch_input.values, launch_input.selection.target.kind)
        except UserError as problem:
            error = problem
    context = {
        **build_method_context(launch_input),
        "chosen_method": settings_form.get_method_name(launch_input.values),
    }
    return render(request, "runs/_methods.html", context | ({"simulating": False} if error else {}))


def build_method_context(launch_input: LaunchInput) -> dict[str, Any]:
    """The context of the method cards. `simulating` is true while forecasts are missing."""
    model, version = launch_input.selection.model, launch_input.selection.version
    lengths = token_lengths.get_cached_lengths(version, model) if model and version else None
    costs = compute_method_costs(model, lengths, launch_input.values, launch_input.selection.target)
    return {"method_costs": costs, "simulating": any(cost.is_pending for cost in costs.values())}


def build_settings_context(
    request: AuthenticatedRequest, launch_input: LaunchInput
) -> dict[str, Any]:
    return {
        "auto": launch_input.is_auto,
        "plan_state": launch_input.plan_state,
        "goals": GOALS,
        "groups": settings_form.group_fields(launch_input.values, advanced=False),
        "advanced": settings_form.group_fields(launch_input.values, advanced=True),
        "unsupported_features": settings_form.list_unsupported_features(launch_input.values),
        **({} if launch_input.is_auto else build_method_context(launch_input)),
        "chosen_method": settings_form.get_method_name(launch_input.values),
    }
