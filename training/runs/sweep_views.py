"""A sweep's page: its runs side by side, and the button that stops them."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from training.people.requests import SignedIn
from training.people.visible import get_changeable, get_visible
from training.runs import launch, listing
from training.runs.models import Run, Sweep
from training.runs.state_words import describe
from training.runs.states import OPEN


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
