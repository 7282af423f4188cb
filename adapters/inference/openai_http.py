"""OpenAI's HTTP format for the gateway and the inference server: errors, and requests up to a size
limit. No Django and no torch here.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from training.text_input import InvalidInput, parse_json

MAX_BODY_BYTES = 1_000_000


class HttpError(Exception):
    """An error response in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)
        self.headers = None if retry_seconds is None else {"Retry-After": str(retry_seconds)}


class InvalidField(HttpError):
    """Status 400: a field has a wrong value; `param` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(400, message, param=param)


def error_body(
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def handle_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return JSONResponse(error.body, error.status, error.headers)


def handle_routing_error(request: Request, error: Exception) -> Response:
    """An unknown URL or method."""
    assert isinstance(error, HTTPException)
    message = f"Invalid URL ({request.method} {request.url.path[:200]})."
    code = "unknown_url"
    if error.status_code == 405:
        message = f"{request.method} is not allowed for {request.url.path[:200]}."
        code = "method_not_allowed"
    return JSONResponse(error_body(message, code=code), error.status_code, error.headers)


def handle_server_error(_request: Request, _error: Exception) -> Response:
    """A bug: Starlette raises the error again, so that the server logs it."""
    message = "Internal server error. See the server log for details."
    return JSONResponse(error_body(message, kind="server_error"), 500)


# For Starlette: every error is in OpenAI's format.
EXCEPTION_HANDLERS: dict[Any, Any] = {
    HttpError: handle_http_error,
    HTTPException: handle_routing_error,
    Exception: handle_server_error,
}


async def read_body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Reading stops at MAX_BODY_BYTES.

    Raises:
        HttpError: it is too large, or not a JSON object.
    """
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise HttpError(413, f"The request is larger than {MAX_BODY_BYTES:,} bytes.")
    try:
        body = parse_json(bytes(raw), "The request")
    except InvalidInput as error:
        param = error.field.partition(".")[0] or None
        raise HttpError(400, error.message, param=param) from error
    if not isinstance(body, dict):
        raise HttpError(400, "The request must be a JSON object.")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise InvalidField("stream_options must be an object.", "stream_options")
    return body
