"""The launch page and its card, runs from files, and sweeps."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.catalog.models import BaseModel, ModelState
from training.datasets.models import Dataset, DatasetVersion
from training.datasets.visible import visible_data
from training.engine.config import RunConfig
from training.engine.methods import TABLE
from training.errors import NotFound, UserError
from training.people.requests import SignedIn, number
from training.people.visible import get_changeable, get_visible
from training.runs import form, launch, listing, measure, run_file, sweep
from training.runs.forecast import forecast
from training.runs.laws import law
from training.runs.memory import device_kind
from training.runs.models import Run, Sweep
from training.runs.state_words import describe
from training.runs.states import OPEN

CHOSEN = ("model", "data", "name")


def new(request: SignedIn) -> HttpResponse:
    """The launch page. `?from=ID` copies everything of a run."""
    source = number(request.GET.get("from", ""))
    copied = get_visible(Run, request.user, source) if source else None
    values: dict[str, Any] = copied.config if copied else {}
    chosen = {"model": "", "data": request.GET.get("data", ""), "name": ""}
    if copied:
        name = f"{copied.name} again"[: launch.MAX_NAME]
        chosen = {"model": str(copied.base_model_id), "data": str(copied.data_id), "name": name}
    error = None
    if request.method == "POST":
        chosen, values = posted(request)
        try:
            return start(request, chosen, values)
        except UserError as problem:
            error = problem
    return page(request, chosen, values, error)


@require_POST
def from_file(request: SignedIn) -> HttpResponse:
    """The launch page filled from a run's YAML file; nothing is started."""
    uploaded = request.FILES.get("file")
    chosen, values, error = dict.fromkeys(CHOSEN, ""), {}, None
    try:
        if uploaded is None:
            raise UserError("Choose a YAML file first.", field="file")
        described = run_file.read_yaml(uploaded.read(4 * run_file.MAX_CHARACTERS + 1).decode("utf-8", errors="replace"))
        values = described["settings"]
        chosen["name"] = described["name"][: launch.MAX_NAME]
        chosen["model"] = str(run_file.find_model(described).pk)
        chosen["data"] = str(run_file.find_data(request.user, described).pk)
        sweep.members(values)
        refuse_words(values)
    except UserError as problem:
        error = problem
    return page(request, chosen, values, error)


def refuse_words(values: dict[str, Any]) -> None:
    """Raises UserError: several values of a setting that the page offers one of; it would start less than the file says."""
    for name, field in form.fields({}).items():
        if isinstance(values.get(name), list) and field.kind not in ("int", "float"):
            raise UserError(
                f"{name} has several values; start this file with `manage.py launch`, or POST it to the API.", field=name
            )


def posted(request: SignedIn) -> tuple[dict[str, str], dict[str, Any]]:
    return {name: request.POST.get(name, "") for name in CHOSEN}, form.settings_from(request.POST)


def start(request: SignedIn, chosen: dict[str, str], values: dict[str, Any]) -> HttpResponse:
    """Launch a run, or a sweep if a setting has several values.

    Raises:
        Unwise: there are warnings that the person has not seen.
    """
    model, version = chosen_model(chosen["model"]), chosen_version(request, chosen["data"])
    asked: dict[str, Any] = {"base_model": model, "data": version, "settings": values, "name": chosen["name"]}
    fixed, grid = sweep.split_grid(values)
    warnings = sweep.warnings_of(sweep.members(values), model, version)
    unseen = [words for words in warnings if sweep.mark(words) not in request.POST.getlist("seen")]
    if unseen:
        raise launch.Unwise(unseen)
    if grid:
        return redirect("sweep", sweep.launch_sweep(request.user, **asked).pk)
    return redirect("run", launch.launch_run(request.user, **{**asked, "settings": fixed}).pk)


def chosen_model(text: str) -> BaseModel:
    model = BaseModel.objects.filter(pk=number(text)).first()
    if model is None:
        raise NotFound("Choose a base model.", field="model")
    return model


def chosen_version(request: SignedIn, text: str) -> DatasetVersion:
    version = visible_data(request.user, number(text))
    if version is None:
        raise NotFound("Choose a data set.", field="data")
    return version


def page(request: SignedIn, chosen: dict[str, str], values: dict[str, Any], error: UserError | None) -> HttpResponse:
    datasets = Dataset.objects.visible_to(request.user).prefetch_related("versions")
    versions = [version for dataset in datasets for version in dataset.versions.all()]
    models = list(BaseModel.objects.exclude(state=ModelState.FAILED))
    if not chosen["data"] and len(versions) == 1:
        chosen["data"] = str(versions[0].pk)
    if not chosen["model"] and len(models) == 1:
        chosen["model"] = str(models[0].pk)
    shown = {
        "models": models,
        "versions": versions,
        "chosen": chosen,
        "error": error,
        **shown_settings(values),
        "open_fold": error is not None and getattr(form.fields({}).get(error.field), "advanced", False),
        **card_values(request, chosen, {**form.settings_from({}), **values} if values else {}),
    }
    return render(request, "runs/new.html", shown, status=error.status if error else 200)


@require_POST
def settings(request: SignedIn) -> HttpResponse:
    """The settings of the technique that was chosen; what a person turned stays."""
    values = form.follow_method(form.settings_from(request.POST))
    answer = render(request, "runs/_settings.html", shown_settings(values))
    answer["HX-Trigger-After-Swap"] = "measured"  # the card reads the form anew
    return answer


def shown_settings(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "groups": form.groups(values, advanced=False),
        "advanced": form.groups(values, advanced=True),
        "techniques": TABLE,
        "chosen_method": form.method_of(values),
    }


@require_POST
def card(request: SignedIn) -> HttpResponse:
    """The card beside the form, for what the form says at this moment."""
    chosen, values = posted(request)
    return render(request, "runs/_card.html", card_values(request, chosen, values))


def card_values(request: SignedIn, chosen: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """What will happen, or the next thing that is missing."""
    said: dict[str, Any] = {"missing": "", "count": 1}
    model = BaseModel.objects.filter(pk=number(chosen["model"]), state=ModelState.READY).first()
    version = visible_data(request.user, number(chosen["data"]))
    said |= {"model": model, "version": version, "method": TABLE[form.method_of(values)]}
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
    """Simulate a step of what the form says; the card asks for this when its memory law has not been made yet."""
    chosen, values = posted(request)
    try:
        config = RunConfig.from_dict(sweep.members(values)[0])
        law(chosen_model(chosen["model"]).folder, config, device_kind())
    except UserError as error:
        return render(request, "_error.html", {"error": error})
    answer = HttpResponse(status=204)
    answer["HX-Trigger"] = "measured"
    return answer


def show_sweep(request: SignedIn, sweep_id: int) -> HttpResponse:
    found = get_visible(Sweep, request.user, sweep_id, "owner")
    runs = list(Run.objects.visible_to(request.user).filter(sweep=found).select_related(*listing.RELATED).order_by("pk"))
    finished = [run for run in runs if run.best_heldout_loss is not None]
    best = min(finished, key=lambda run: run.best_heldout_loss or 0.0, default=None)
    rows = [(run, describe(run), [run.config.get(name) for name in found.grid], run == best) for run in runs]
    values = {"sweep": found, "rows": rows, "best": best, "moving": any(run.state in OPEN for run in runs)}
    return render(request, "runs/_sweep.html" if request.headers.get("HX-Request") else "runs/sweep.html", values)


@require_POST
def stop_sweep(request: SignedIn, sweep_id: int) -> HttpResponse:
    launch.stop_all(get_changeable(Sweep, request.user, sweep_id))
    return redirect("sweep", sweep_id)
