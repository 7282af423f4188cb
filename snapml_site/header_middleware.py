"""Drops cookies, and rejects hosts and content types that Django cannot read.

Django decodes cookies and content types before its first middleware runs, and logs a traceback for
an invalid host, so this is ASGI middleware, for pages, the API and WebSockets alike. `/v1/` reads
none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.http import parse_cookie
from django.http.request import split_domain_port, validate_host
from django.utils.http import parse_header_parameters
from starlette.responses import JSONResponse

from snapml_site.api import problem_body
from training.text_input import clean_value

log = logging.getLogger("snapml.web")
UTF_8 = ("utf-8", "utf8")
CONTENT_TYPE_MESSAGE = "The content type of the request must be valid, and its charset UTF-8."
HOST_MESSAGE = "The host of the request is not a name of this site."


class HeaderMiddleware:
    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        headers = [
            (name, drop_unstorable_cookies(value) if name == b"cookie" else value)
            for name, value in scope["headers"]
        ]
        message = find_header_error(scope) if scope["type"] == "http" else ""
        if message:
            return await JSONResponse(problem_body(message), 400)(scope, receive, send)
        return await self.application({**scope, "headers": headers}, receive, send)


def find_header_error(scope: Any) -> str:
    """The message about a header that Django cannot read, or an empty string."""
    host = read_host(scope)
    if not is_allowed_host(host):
        log.warning("Rejected a request for the host %.100r, which is not in SNAPML_HOSTS.", host)
        return HOST_MESSAGE
    return "" if has_readable_content_type(scope["headers"]) else CONTENT_TYPE_MESSAGE


def read_host(scope: Any) -> str:
    """The host as Django reads it: several headers are one, and the server's address replaces a
    missing one.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    server = scope.get("server") or ("unknown",)  # none on a Unix socket
    return ",".join(hosts) if hosts else str(server[0])


def is_allowed_host(host: str) -> bool:
    """Whether a request may name this host and port."""
    domain, _port = split_domain_port(host)
    return bool(domain) and validate_host(domain, settings.ALLOWED_HOSTS)


def drop_unstorable_cookies(header: bytes) -> bytes:
    """The header without the cookies whose decoded names or values databases cannot hold: an octal
    escape may stand for NUL.
    """
    return b";".join(part for part in header.split(b";") if has_storable_cookie(part))


def has_storable_cookie(part: bytes) -> bool:
    cookie = parse_cookie(part.decode("latin-1"))
    return bool(clean_value(cookie) == cookie)


def has_readable_content_type(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the request has no charset, or UTF-8, as everywhere else in SnapML."""
    values = [value.decode("latin-1") for name, value in headers if name == b"content-type"]
    try:
        _content_type, parameters = parse_header_parameters(",".join(values))
    except (ValueError, LookupError):
        return False
    return parameters.get("charset", UTF_8[0]).lower() in UTF_8
