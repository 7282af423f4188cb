from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import include, path

from snapml_site import frame
from snapml_site.api import api
from training.people.requests import SignedIn


def health(_request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok", content_type="text/plain")


def strip(request: SignedIn) -> HttpResponse:
    return render(request, "_strip.html", frame.strip(request.user))


urlpatterns = [
    path("", include("training.runs.urls")),
    path("", include("training.datasets.urls")),
    path("", include("training.catalog.urls")),
    path("", include("training.people.urls")),
    path("", include("training.webhooks.urls")),
    path("", include("training.gpus.urls")),
    path("", include("adapters.urls")),
    path("api/v1/", api.urls),
    path("admin/", admin.site.urls),
    path("health", health, name="health"),
    path("strip", strip, name="strip"),
]
handler404 = "snapml_site.doors.not_found"
