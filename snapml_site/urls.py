from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib import admin
from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import URLPattern, URLResolver, include, path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe

from snapml_site import context_processors
from snapml_site.api import api
from snapml_site.middleware import PASSWORD_PAGE
from training.errors import NotAllowed
from training.people.requests import AuthenticatedRequest


@csrf_exempt  # so that a POST is a 405
@require_safe
@login_not_required
def health(_request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok", content_type="text/plain")


@require_safe
def show_status_bar(request: AuthenticatedRequest) -> HttpResponse:
    return render(request, "_status_bar.html", context_processors.build_status_bar(request.user))


@require_safe
def enter_admin(request: AuthenticatedRequest) -> HttpResponse:
    """Replaces the sign-in page of the admin site, which does not count wrong passwords."""
    if not admin.site.has_permission(request):
        raise NotAllowed("The admin site is for admins.")
    return redirect("admin:index")


@require_safe
def change_admin_password(_request: AuthenticatedRequest) -> HttpResponse:
    """Replaces the password page of the admin site, which does not count wrong passwords and leaves
    `must_change_password` set.
    """
    return redirect(PASSWORD_PAGE)


def accept_head(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Let a view of Ninja, which does not support HEAD, answer it as a GET. The web server does not
    send the body.
    """

    @wraps(view)
    def wrapper(request: HttpRequest, **parameters: Any) -> HttpResponse:
        if request.method != "HEAD":
            return view(request, **parameters)
        request.method = "GET"
        try:
            return view(request, **parameters)
        finally:
            request.method = "HEAD"

    return wrapper


def build_api_urls() -> tuple[list[URLPattern | URLResolver], str, str]:
    """The API's URLs, without Django's login check: Ninja authenticates every operation and answers
    401. Where a GET is allowed, a HEAD is too.
    """
    patterns, app_name, namespace = api.urls
    for pattern in patterns:
        assert pattern.callback is not None, "ninja's URLs are flat"
        pattern.callback = login_not_required(accept_head(pattern.callback))
    return patterns, app_name, namespace


urlpatterns = [
    path("", include("training.runs.urls")),
    path("", include("training.datasets.urls")),
    path("", include("training.catalog.urls")),
    path("", include("training.people.urls")),
    path("", include("training.webhooks.urls")),
    path("", include("training.gpus.urls")),
    path("", include("adapters.urls")),
    path("api/v1/", build_api_urls()),
    path("admin/login/", enter_admin, name="admin-login"),
    path("admin/password_change/", change_admin_password, name="admin-password"),
    path("admin/", admin.site.urls),
    path("health", health, name="health"),
    path("status-bar", show_status_bar, name="status-bar"),
]
handler404 = "snapml_site.middleware.page_not_found"
