"""What stands before every page: sign-in, a new password where one is due, and one handler for
errors that people read.
"""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse

from training.errors import UserError

OPEN_PAGES = {"sign-in", "sign-out", "health"}
PASSWORD_PAGES = {"password", "sign-out"}


class LoginDoor:
    """Every page is behind a login but those in OPEN_PAGES; the API has a door of its own
    (snapml_site/api.py).
    """

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_view(
        self, request: HttpRequest, _view: object, _args: object, _kwargs: object
    ) -> HttpResponseBase | None:
        match = request.resolver_match
        name = match.url_name if match else ""
        if name in OPEN_PAGES or (match and match.namespace == "api"):
            return None
        if not request.user.is_authenticated:
            if request.headers.get("HX-Request"):
                answer = HttpResponse(status=401)
                answer["HX-Redirect"] = reverse("sign-in")
                return answer
            return redirect(f"{reverse('sign-in')}?next={request.path}")
        if request.user.must_change_password and name not in PASSWORD_PAGES:
            # The strip asks every 5 s: followed, a redirect would put the whole page into it.
            return (
                HttpResponse(status=204)
                if request.headers.get("HX-Request")
                else redirect("password")
            )
        return None


class ErrorDoor:
    """A UserError becomes a page, a fragment or JSON with its status; nothing else is caught."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        if not isinstance(error, UserError):
            return None
        if "application/json" in request.headers.get("Accept", ""):
            return JsonResponse(
                {"error": {"message": error.message, "field": error.field}}, status=error.status
            )
        template = "_error.html" if request.headers.get("HX-Request") else "error.html"
        return render(request, template, {"error": error}, status=error.status)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """An address that nothing answers to: a page for people, the API's shape for programs."""
    if request.path.startswith("/api/"):
        message = "There is nothing at this address; /api/v1/openapi.json lists what there is."
        return JsonResponse({"error": {"message": message, "field": ""}}, status=404)
    return render(request, "404.html", status=404)
