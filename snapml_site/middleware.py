"""Middleware for text input, sign-in, one-time passwords, and UserError responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.contrib.auth import middleware
from django.core.exceptions import (
    BadRequest,
    RequestDataTooBig,
    SuspiciousOperation,
    TooManyFieldsSent,
    TooManyFilesSent,
)
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
    QueryDict,
    UnreadablePostError,
)
from django.http.multipartparser import MultiPartParserError
from django.shortcuts import redirect, render
from django.urls import reverse

from training.errors import TooLarge, UserError, find_storage_error
from training.people.current_user import current_username
from training.text_input import InvalidInput, check_text, clean_value

# What Django raises while it reads the form of a request
MALFORMED_FORMS = (BadRequest, MultiPartParserError, UnreadablePostError)
PASSWORD_PAGE = "password"  # noqa: S105  the name of a page


class LoginRequiredMiddleware(middleware.LoginRequiredMiddleware):
    """Django's middleware, for a site with a single sign-in page and htmx fragments. Public views
    use `login_not_required`; the API authenticates on its own (snapml_site/urls.py).
    """

    def get_login_url(self, view_func: Any) -> str:
        """Never the sign-in page of the admin site, which does not count wrong passwords."""
        return str(settings.LOGIN_URL)

    def handle_no_permission(  # type: ignore[override]  # not only redirects
        self, request: HttpRequest, view_func: Any
    ) -> HttpResponseBase:
        if request.headers.get("HX-Request"):
            response = HttpResponse(status=401)
            response["HX-Redirect"] = reverse(settings.LOGIN_URL)
            return response
        return super().handle_no_permission(request, view_func)


class CurrentUserMiddleware:
    """Sets the user for whom the request's child programs count."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        token = current_username.set(request.user.get_username())
        try:
            return self.get_response(request)
        finally:
            current_username.reset(token)


class OneTimePasswordMiddleware:
    """A user with a one-time password can only change it and open public pages."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, _args: object, _kwargs: object
    ) -> HttpResponseBase | None:
        match = request.resolver_match
        is_open = not getattr(view, "login_required", True)
        if is_open or not request.user.is_authenticated or not request.user.must_change_password:
            return None
        if match is not None and match.view_name == PASSWORD_PAGE:
            return None
        if request.headers.get("HX-Request"):
            # The status bar polls every 5 s; a redirect would insert a whole page into it.
            return HttpResponse(status=204)
        return redirect(PASSWORD_PAGE)


class InputMiddleware:
    """Checks the text of every path, query and page form (training/text_input.py) before CSRF
    protection reads the form; the API's parser and the gateway check their bodies. Headers are
    checked in header_middleware.py. Files that the view did not keep are deleted.
    """

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            return self.get_response(request)
        finally:
            # When a form cannot be read, Django leaves the file of the part it was reading open.
            for handler in request.upload_handlers:
                handler.upload_interrupted()

    def process_view(
        self, request: HttpRequest, view: Any, _args: object, _kwargs: object
    ) -> HttpResponseBase | None:
        """Only CSRF protection exempts the API, whose parser reads a form after the
        authentication.
        """
        if clean_value(request.path_info) != request.path_info:
            return page_not_found(request, Http404())
        try:
            check_fields(request.GET)
            if not getattr(view, "csrf_exempt", False):
                check_fields(request.POST)
        except Exception as error:
            user_error = find_user_error(error)
            if user_error is None:
                raise
            return render_user_error(request, user_error)
        return None


def check_fields(fields: QueryDict) -> None:
    """Raises InvalidInput: a field's name or one of its values is not text."""
    for name, values in fields.lists():
        check_text(name, "A field's name", field="")
        for value in values:
            check_text(value, name)


class UserErrorMiddleware:
    """Renders an error that a person can fix as a page, a fragment or JSON, with its status. Other
    exceptions pass through.
    """

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        user_error = find_user_error(error)
        return render_user_error(request, user_error) if user_error else None


def find_user_error(error: Exception) -> UserError | None:
    """The error for users if the request is malformed or too large, or the disk is full; None for
    an error of the server.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, RequestDataTooBig | TooManyFieldsSent | TooManyFilesSent):
        return TooLarge("The request body is too large, or has too many fields or files.")
    if isinstance(error, MALFORMED_FORMS):
        return InvalidInput(
            "The body of the request cannot be read. Send a valid form.", code="malformed_request"
        )
    if isinstance(error, SuspiciousOperation):
        return InvalidInput("The request is not valid.", code="suspicious_request")
    return find_storage_error(error)


def render_user_error(request: HttpRequest, error: UserError) -> HttpResponseBase:
    is_api = request.path.startswith("/api/")
    if is_api or "application/json" in request.headers.get("Accept", ""):
        return JsonResponse(
            {"error": {"message": error.message, "field": error.field}}, status=error.status
        )
    template = "_error.html" if request.headers.get("HX-Request") else "error.html"
    return render(request, template, {"error": error}, status=error.status)


def page_not_found(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """404 responses: a page for browsers, JSON for the API."""
    if request.path.startswith("/api/"):
        message = "Not found. See /api/v1/openapi.json for the API's operations."
        return JsonResponse({"error": {"message": message, "field": ""}}, status=404)
    return render(request, "404.html", status=404)
