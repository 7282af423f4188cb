"""Drops cookies and refuses content types that Django cannot read.

Django decodes both before its first middleware runs, so this is ASGI middleware, for pages, the API
and WebSockets alike. `/v1/` reads neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.http import parse_cookie
from django.utils.http import parse_header_parameters
from starlette.responses import JSONResponse

from training.text_input import clean_value

UTF_8 = ("utf-8", "utf8")
MESSAGE = "The content type of the request must be valid, and its charset UTF-8."


class HeaderMiddleware:
    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        headers = [
            (name, drop_unstorable_cookies(value) if name == b"cookie" else value)
            for name, value in scope["headers"]
        ]
        if scope["type"] == "http" and not has_readable_content_type(headers):
            error = {"message": MESSAGE, "field": ""}
            return await JSONResponse({"error": error}, 400)(scope, receive, send)
        return await self.application({**scope, "headers": headers}, receive, send)


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
