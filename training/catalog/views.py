"""The Models page: base models, the progress of imports, and the form that adds a model."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST, require_safe

from training.catalog import services
from training.catalog.models import BaseModel, ModelState
from training.errors import UserError
from training.people.pagination import paginate
from training.people.requests import AuthenticatedRequest

MODELS_PER_PAGE = 50


@require_safe
def show_models(request: AuthenticatedRequest) -> HttpResponse:
    page = paginate(request, BaseModel.objects.all(), MODELS_PER_PAGE)
    is_importing = any(model.state in (ModelState.WAITING, ModelState.IMPORTING) for model in page)
    template = "catalog/_cards.html" if request.headers.get("HX-Request") else "catalog/models.html"
    poll_address = request.get_full_path() if is_importing else ""
    return render(request, template, {"page": page, "poll_address": poll_address})


@require_safe
def show_model(request: AuthenticatedRequest, model_id: int) -> HttpResponse:
    return render(
        request, "catalog/model.html", {"model": get_object_or_404(BaseModel, pk=model_id)}
    )


@require_POST
def add_model(request: AuthenticatedRequest) -> HttpResponse:
    location = request.POST.get("location", "").strip()
    try:
        if request.POST.get("source") == "hub":
            services.add_from_hub(request.user, location, request.POST.get("revision", "").strip())
            messages.success(request, f"Downloading {location}.")
        else:
            model = services.add_folder(request.user, location)
            messages.success(request, f"{model.name} added.")
    except UserError as error:
        context = {
            "page": paginate(request, BaseModel.objects.all(), MODELS_PER_PAGE),
            "error": error,
            "location": location,
            "source": request.POST.get("source"),
        }
        return render(request, "catalog/models.html", context, status=error.status)
    return redirect("models")


@require_POST
def retry_import(request: AuthenticatedRequest, model_id: int) -> HttpResponse:
    services.retry_import(request.user, get_object_or_404(BaseModel, pk=model_id))
    return redirect("models")
