"""Deployments: the list, a page for each with its figures live, and the acts on them."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpResponse, JsonResponse, QueryDict
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from adapters.export import merge
from adapters.models import AdapterVersion, Deployment
from adapters.serving import services, usage
from adapters.serving.services import Answering
from training.errors import NotFound, UserError
from training.jobs.models import Job, JobState
from training.people.requests import SignedIn, number
from training.people.visible import get_visible, may_change

HISTORY = 50
MOST_CHOICES = 200


def deployments(request: SignedIn) -> HttpResponse:
    rows = list(
        Deployment.objects.visible_to(request.user).select_related(
            "version__base_model", "other", "owner"
        )[:MOST_CHOICES]
    )
    rates = usage.rates_of(rows)
    values = {"deployments": [(row, rates[row.pk]) for row in rows], "versions": choices(request)}
    return render(request, "adapters/deployments.html", values)


def deployment(request: SignedIn, name: str) -> HttpResponse:
    found = named(request, name)
    values = {
        **live_values(found),
        "mine": Deployment.objects.changeable_by(request.user).filter(pk=found.pk).exists(),
        "changes": found.changes.select_related("by", "version", "other")[:HISTORY],
        "before": services.previous(found),
        "versions": choices(request),
        "address": request.build_absolute_uri("/v1"),
    }
    return render(request, "adapters/deployment.html", values)


def live(request: SignedIn, name: str) -> HttpResponse:
    """What changes while people ask: figures, counts and merges."""
    return render(request, "adapters/_deployment.html", live_values(named(request, name)))


def minutes(request: SignedIn, name: str) -> JsonResponse:
    found = named(request, name)
    rows = usage.by_minute(found)
    labels = {
        version.pk: str(version)
        for version in AdapterVersion.objects.filter(pk__in={row["version"] for row in rows})
    }
    return JsonResponse({"rows": rows, "labels": labels})


def live_values(found: Deployment) -> dict[str, Any]:
    answering = [found.version, *([found.other] if found.other else [])]
    jobs = Job.objects.filter(kind=merge.KIND, key__in=[str(version.pk) for version in answering])
    return {
        "deployment": found,
        "rates": usage.rates(found),
        "tallies": found.tallies.select_related("version").order_by("-answers"),
        "answering": [
            (
                version,
                share_of(found, version),
                how(found, version, {job.key: job for job in jobs}),
            )
            for version in answering
        ],
    }


def share_of(found: Deployment, version: AdapterVersion) -> int:
    """Per cent of the traffic."""
    if found.other is None:
        return 100
    return found.share if version.pk == found.other_id else 100 - found.share


def how(found: Deployment, version: AdapterVersion, jobs: dict[str, Job]) -> dict[str, Any]:
    """How a version answers now, in words; `working` while a merge is under way."""
    task = jobs.get(str(version.pk))
    if version.whole_model:
        return {"words": "a whole model of its own, nothing to merge"}
    if version.method_row.merge_unsupported_reason:
        return {
            "words": f"attached to its base: {version.method_row.title} cannot be merged. "
            f"{version.method_row.merge_unsupported_reason}"
        }
    if not found.merge:
        return {"words": "attached to its base, as you chose"}
    if merge.is_merged(version):
        return {
            "words": "merged into its base: it answers at the base's own speed",
            "parity": task.result["parity"] if task else None,
        }
    if task is not None and task.state == JobState.FAILED:
        return {
            "words": "attached to its base, because it could not be merged",
            "error": task.error,
        }
    return {"words": "attached to its base until it is merged", "working": task}


@require_POST
def deploy_new(request: SignedIn) -> HttpResponse:
    made = services.deploy(
        request.user, request.POST.get("name", ""), answering_of(request, request.POST)
    )
    return redirect("deployment", made.name)


@require_POST
def switch(request: SignedIn, name: str) -> HttpResponse:
    found = named(request, name)
    may_change(request.user, found)
    now = services.switch(request.user, found, answering_of(request, request.POST))
    messages.success(
        request,
        f"{name} answers with {services.words_of(Answering(now.version, now.other, now.share))} "
        "now.",
    )
    return redirect("deployment", name)


@require_POST
def back(request: SignedIn, name: str) -> HttpResponse:
    now = services.roll_back(request.user, named(request, name))
    messages.success(
        request,
        f"{name} is back to {services.words_of(Answering(now.version, now.other, now.share))}.",
    )
    return redirect("deployment", name)


@require_POST
def down(request: SignedIn, name: str) -> HttpResponse:
    services.take_down(request.user, named(request, name), request.POST.get("name", ""))
    messages.success(request, f"{name} is taken down; its versions stay on the shelf.")
    return redirect("deployments")


def named(request: SignedIn, name: str) -> Deployment:
    """Raises NotFound: not there, or not theirs to see."""
    rows = Deployment.objects.visible_to(request.user)
    found: Deployment | None = (
        rows.select_related("owner", "team", "version__base_model", "other__base_model")
        .filter(name=name)
        .first()
    )
    if found is None:
        raise NotFound(f"There is no deployment {name} that you may see.")
    return found


def answering_of(request: SignedIn, form: QueryDict) -> Answering:
    """Who shall answer, from a form. Raises UserError: no version is chosen, or the share is no
    number.
    """
    if not form.get("version"):
        raise UserError("Choose a version to deploy.", field="version")
    version = get_visible(
        AdapterVersion, request.user, number(str(form["version"])), "base_model", "team"
    )
    other = (
        get_visible(AdapterVersion, request.user, number(str(form["other"])), "base_model", "team")
        if form.get("other")
        else None
    )
    share = form.get("share", "") if other else "0"
    if not share.isdecimal():
        raise UserError("The second version's share must be from 1 to 99 per cent.", field="share")
    return Answering(version, other, int(share[:4]), merge=form.get("merge") != "no")


def choices(request: SignedIn) -> Any:
    return AdapterVersion.objects.visible_to(request.user).select_related("base_model")[
        :MOST_CHOICES
    ]
