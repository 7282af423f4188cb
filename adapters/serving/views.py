"""Pages of deployments: the list, a page with live figures for each, and the forms that change
them.
"""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpResponse, JsonResponse, QueryDict
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from adapters.export import merge
from adapters.models import AdapterVersion, Deployment
from adapters.option_sources import ADAPTER_VERSIONS
from adapters.serving import services, usage
from adapters.serving.services import Routing
from training.errors import NotFound, UserError
from training.jobs.models import Job, JobState
from training.people.options import list_options
from training.people.pagination import paginate
from training.people.permissions import check_changeable, get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero

CHANGES_PER_PAGE = 50
COUNTERS_PER_PAGE = 20
DEPLOYMENTS_PER_PAGE = 50


@require_safe
def list_deployments(request: AuthenticatedRequest) -> HttpResponse:
    rows = Deployment.objects.visible_to(request.user).select_related(
        "version__base_model", "canary", "owner"
    )
    page = paginate(request, rows, DEPLOYMENTS_PER_PAGE)
    rates = usage.get_rates_by_deployment(list(page))
    values = {
        "page": page,
        "deployments": [(row, rates[row.pk]) for row in page],
        "versions": list_options(request.user, ADAPTER_VERSIONS),
    }
    return render(request, "adapters/deployments.html", values)


@require_safe
def show_deployment(request: AuthenticatedRequest, name: str) -> HttpResponse:
    deployment = get_deployment(request, name)
    values = {
        **get_live_context(request, deployment),
        "can_change": Deployment.objects.changeable_by(request.user)
        .filter(pk=deployment.pk)
        .exists(),
        "changes": paginate(
            request, deployment.changes.select_related("by"), CHANGES_PER_PAGE, "history"
        ),
        "previous": services.find_previous_change(deployment),
        "versions": list_options(request.user, ADAPTER_VERSIONS, deployment.version_id),
        "canaries": list_options(request.user, ADAPTER_VERSIONS, deployment.canary_id),
        "address": request.build_absolute_uri("/v1"),
    }
    return render(request, "adapters/deployment.html", values)


@require_safe
def show_live_status(request: AuthenticatedRequest, name: str) -> HttpResponse:
    """The part of the page that is refreshed: figures, counts and merges."""
    deployment = get_deployment(request, name)
    return render(request, "adapters/_deployment.html", get_live_context(request, deployment))


@require_safe
def show_usage_by_minute(request: AuthenticatedRequest, name: str) -> JsonResponse:
    deployment = get_deployment(request, name)
    rows = usage.get_usage_by_minute(deployment)
    versions = AdapterVersion.objects.in_bulk({row["version"] for row in rows} - {None})
    labels = {pk: str(version) for pk, version in versions.items()}
    if any(row["version"] is None for row in rows):
        labels[None] = "Other versions"
    return JsonResponse({"rows": rows, "labels": labels})


def get_live_context(request: AuthenticatedRequest, deployment: Deployment) -> dict[str, Any]:
    serving_versions = [deployment.version, *([deployment.canary] if deployment.canary else [])]
    jobs = Job.objects.filter(
        kind=merge.KIND, key__in=[str(version.pk) for version in serving_versions]
    )
    counters = deployment.usage_counters.select_related("version").order_by("-answers", "pk")
    served = dict(counters.filter(version__in=serving_versions).values_list("version", "answers"))
    return {
        "deployment": deployment,
        "rates": usage.get_rates(deployment),
        "previous_counters": paginate(
            request,
            counters.exclude(version__in=serving_versions),
            COUNTERS_PER_PAGE,
            "previous",
        ),
        "serving_versions": [
            (
                version,
                get_traffic_percent(deployment, version),
                describe_serving(deployment, version, {job.key: job for job in jobs}),
                served.get(version.pk),
            )
            for version in serving_versions
        ],
    }


def get_traffic_percent(deployment: Deployment, version: AdapterVersion) -> int:
    """The percentage of the traffic that goes to the version."""
    if deployment.canary is None:
        return 100
    return (
        deployment.canary_percent
        if version.pk == deployment.canary_id
        else 100 - deployment.canary_percent
    )


def describe_serving(
    deployment: Deployment, version: AdapterVersion, jobs: dict[str, Job]
) -> dict[str, Any]:
    """How a version is served now. `merge_job` is the job while a merge is running."""
    merge_job = jobs.get(str(version.pk))
    if version.is_full_model:
        return {"description": "a full model, nothing to merge"}
    if version.method_spec.merge_unsupported_reason:
        return {
            "description": f"attached to its base: {version.method_spec.title} cannot be merged. "
            f"{version.method_spec.merge_unsupported_reason}"
        }
    if not deployment.use_merged:
        return {"description": "attached to its base: merging is turned off for this deployment"}
    if merge.is_merged(version):
        return {
            "description": "merged into its base: as fast as the base model",
            "parity": merge_job.result["parity"] if merge_job else None,
        }
    if merge_job is not None and merge_job.state == JobState.FAILED:
        return {
            "description": "attached to its base, because merging failed",
            "error": merge_job.error,
        }
    return {"description": "attached to its base until the merge is done", "merge_job": merge_job}


@require_POST
def create_deployment(request: AuthenticatedRequest) -> HttpResponse:
    deployment = services.create_deployment(
        request.user, request.POST.get("name", ""), parse_routing(request, request.POST)
    )
    return redirect("deployment", deployment.name)


@require_POST
def switch_deployment(request: AuthenticatedRequest, name: str) -> HttpResponse:
    deployment = get_deployment(request, name)
    check_changeable(request.user, deployment)
    switched = services.switch_deployment(
        request.user, deployment, parse_routing(request, request.POST)
    )
    messages.success(
        request,
        f"{name} now serves {services.describe_routing(switched)}.",
    )
    return redirect("deployment", name)


@require_POST
def roll_back_deployment(request: AuthenticatedRequest, name: str) -> HttpResponse:
    rolled_back = services.roll_back(request.user, get_deployment(request, name))
    messages.success(
        request,
        f"{name} was rolled back to {services.describe_routing(rolled_back)}.",
    )
    return redirect("deployment", name)


@require_POST
def delete_deployment(request: AuthenticatedRequest, name: str) -> HttpResponse:
    services.delete_deployment(
        request.user, get_deployment(request, name), request.POST.get("name", "")
    )
    messages.success(request, f"Deployment {name} was deleted. Its adapters are kept.")
    return redirect("deployments")


def get_deployment(request: AuthenticatedRequest, name: str) -> Deployment:
    """Raises NotFound if there is no such deployment or the user may not see it."""
    rows = Deployment.objects.visible_to(request.user)
    deployment: Deployment | None = (
        rows.select_related("owner", "team", "version__base_model", "canary__base_model")
        .filter(name=name)
        .first()
    )
    if deployment is None:
        raise NotFound(f"Deployment {name} not found.")
    return deployment


def parse_routing(request: AuthenticatedRequest, form: QueryDict) -> Routing:
    """Read the routing from a form. Raises UserError if no version is chosen or the share is not a
    number.
    """
    if not form.get("version"):
        raise UserError("Choose a version to deploy.", field="version")
    version = get_visible(
        AdapterVersion, request.user, parse_int_or_zero(str(form["version"])), "base_model", "team"
    )
    canary = (
        get_visible(
            AdapterVersion,
            request.user,
            parse_int_or_zero(str(form["canary"])),
            "base_model",
            "team",
        )
        if form.get("canary")
        else None
    )
    canary_percent = form.get("canary_percent", "") if canary else "0"
    if not canary_percent.isdecimal():
        raise UserError(
            services.CANARY_PERCENT_MESSAGE,
            field="canary_percent",
        )
    return Routing(
        version, canary, int(canary_percent[:4]), use_merged=form.get("use_merged") != "no"
    )
