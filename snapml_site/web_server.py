"""The web server, `python -m snapml_site.web_server`: daphne, with a size limit on request bodies
as they arrive, bodies that stay on disk, and responses that are read as the client takes them.

Daphne spools a whole request to disk before Django sees it, and then loads all of it into memory.
This server rejects a request as soon as its body is declared or turns out to be too long. Only
authenticated users may send large bodies, a few at a time. Django reads the body from disk
(`spooled_body.py`).

Daphne also takes whatever the application sends and keeps it until the client has read it: two
downloads of 400 MB that nobody reads took 780 MB. Here the application waits at its next `send`
while Twisted's buffer of the connection (64 KiB) is full.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, ClassVar

import django
from daphne import http_protocol
from daphne.cli import CommandLineInterface
from daphne.server import Server
from daphne.ws_protocol import WebSocketFactory
from twisted.internet.task import LoopingCall

django.setup()

from django.conf import settings  # noqa: E402
from django.contrib.auth import get_user  # noqa: E402
from django.contrib.sessions.backends.db import SessionStore  # noqa: E402
from django.db import close_old_connections  # noqa: E402
from django.http import HttpRequest  # noqa: E402

from adapters.inference.openai_http import error_body  # noqa: E402
from snapml_site.api import UNAUTHENTICATED_MESSAGE, problem_body  # noqa: E402
from snapml_site.limited_web_socket import LimitedWebSocket  # noqa: E402
from snapml_site.spooled_body import SpooledFile  # noqa: E402
from training.errors import TooLarge, UserError  # noqa: E402
from training.people.tokens import find_token  # noqa: E402

log = logging.getLogger("snapml.web")
UPLOAD_PATHS = (
    b"/data/new",
    b"/api/v1/datasets/uploads",
    b"/adapters/import",
    b"/api/v1/adapters/import",
)
# Daphne decodes them as ASCII, and answers a 500 with a traceback if they are not
ASCII_HEADERS = (b"sec-websocket-protocol", b"daphne-root-path")
MAX_FORM_BYTES = 2**20
MAX_UPLOADS, MAX_UPLOADS_PER_USER = 8, 2  # at the same time
# After this time, an upload with a longer pause or a lower rate is ended: it occupies a slot.
UPLOAD_IDLE_SECONDS = 30.0
MIN_UPLOAD_BYTES_PER_SECOND = 16 * 1024
UPLOAD_CHECK_SECONDS = 5.0
AUTH_TIMEOUT = 3.0
SEND_TIMEOUT, SOCKET_POLL_SECONDS = 300.0, 0.05
# The ORM does not run in the event loop's thread; waiting for this one takes a few ms per upload
database_thread = ThreadPoolExecutor(1)


class UploadRejected(UserError):
    """Nobody is signed in, too many uploads are in progress, or this one is too slow."""

    def __init__(self, message: str, *, status: HTTPStatus) -> None:
        super().__init__(message, code="upload_rejected")
        self.status = status


def find_user_id(session: str, token: str) -> int | None:
    """The user of a valid session or API token.

    Raises:
        PasswordNotChanged: the token's user has to change the one-time password first.
    """
    close_old_connections()
    if token:
        api_token = find_token(token)
        return api_token.user_id if api_token else None
    if not session:
        return None
    request = HttpRequest()
    request.session = SessionStore(session)
    return get_user(request).pk  # None if the user is inactive or has signed out


class LimitedRequest(http_protocol.WebRequest):  # type: ignore[misc]
    """Twisted calls `gotLength` after the headers and `handleContentChunk` for every chunk of the
    body.
    """

    received = 0
    started_at = last_chunk_at = 0.0
    is_complete = is_rejected = False
    rejection: UserError = TooLarge("The request is too large.")
    limit = MAX_FORM_BYTES
    content_types: Sequence[bytes] = ()
    active_uploads: ClassVar[dict[object, int]] = {}  # by request: the user's id

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.can_write = asyncio.Event()
        self.can_write.set()

    def gotLength(self, length: int | None) -> None:
        super().gotLength(length)
        path = self.channel._path.partition(b"?")[0]
        if path in UPLOAD_PATHS and (length is None or length > MAX_FORM_BYTES):
            try:
                self.start_upload()
            except UserError as error:
                self.rejection = error
            except Exception:
                log.exception("An upload could not be authenticated.")
                self.rejection = UploadRejected(
                    "The server is busy. Try again in a minute.",
                    status=HTTPStatus.SERVICE_UNAVAILABLE,
                )
        if length is not None and length > self.limit:
            self.reject_request()

    def start_upload(self) -> None:
        """Raise the limit for a user who may upload.

        Raises:
            PasswordNotChanged: the user has to change the one-time password first.
            UploadRejected: nobody is signed in, or too many uploads are in progress.
        """
        user_id = self.find_uploader()
        if user_id is None:
            raise UploadRejected(UNAUTHENTICATED_MESSAGE, status=HTTPStatus.UNAUTHORIZED)
        own = list(self.active_uploads.values()).count(user_id)
        if own >= MAX_UPLOADS_PER_USER or len(self.active_uploads) >= MAX_UPLOADS:
            raise UploadRejected(
                f"{len(self.active_uploads)} uploads are in progress, {own} of them yours. Wait "
                "until one is done.",
                status=HTTPStatus.TOO_MANY_REQUESTS,
            )
        self.limit = MAX_FORM_BYTES + settings.DATASET_MAX_BYTES
        self.active_uploads[self] = user_id
        self.started_at = self.last_chunk_at = time.monotonic()
        watch = LoopingCall(self.check_rate)
        watch.start(UPLOAD_CHECK_SECONDS, now=False)

        def end_upload(_result: object) -> None:
            self.active_uploads.pop(self, None)
            watch.stop()

        self.notifyFinish().addBoth(end_upload)

    def check_rate(self) -> None:
        """End an upload that is too slow."""
        now = time.monotonic()
        seconds, pause = now - self.started_at, now - self.last_chunk_at
        if self.is_complete or seconds < UPLOAD_IDLE_SECONDS:
            return
        is_slow = self.received < MIN_UPLOAD_BYTES_PER_SECOND * seconds
        if is_slow or pause > UPLOAD_IDLE_SECONDS:
            self.rejection = UploadRejected(
                "The upload is too slow. Try again with a faster connection.",
                status=HTTPStatus.REQUEST_TIMEOUT,
            )
            self.reject_request()

    def find_uploader(self) -> int | None:
        """Raises PasswordNotChanged."""
        session = (self.getCookie(settings.SESSION_COOKIE_NAME.encode()) or b"").decode("latin-1")
        header = (self.getHeader("authorization") or "").partition(" ")
        token = header[2].strip() if header[0].lower() == "bearer" else ""
        return database_thread.submit(find_user_id, session, token).result(AUTH_TIMEOUT)

    def handleContentChunk(self, data: bytes) -> None:
        self.received += len(data)
        self.last_chunk_at = time.monotonic()
        if self.is_rejected or self.received > self.limit:
            self.reject_request()
        else:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Hide the content type from Twisted, which would parse the form itself and use ten times
        the memory of the body. Django parses it again.
        """
        self.is_complete = True
        if not self.is_rejected:
            self.content_types = self.requestHeaders.getRawHeaders(b"content-type", [])
            self.requestHeaders.removeHeader(b"content-type")
            super().requestReceived(command, path, version)

    def process(self) -> None:
        values = [
            value for name in ASCII_HEADERS for value in self.requestHeaders.getRawHeaders(name, [])
        ]
        if not all(value.isascii() for value in values):
            self.basic_error(HTTPStatus.BAD_REQUEST, b"Bad Request", "Invalid header value")
            return
        if self.content_types:
            self.requestHeaders.setRawHeaders(b"content-type", self.content_types)
        if self.received > MAX_FORM_BYTES:
            self.content: object = SpooledFile(self.content)
        super().process()

    def handle_reply(self, message: dict[str, Any]) -> None:
        is_open = not self.finished and self.channel is not None
        if is_open and message["type"] == "http.response.start" and not self.producer:
            self.registerProducer(self, streaming=True)
        super().handle_reply(message)

    def handle_exception(self, exception: BaseException) -> None:
        """Daphne would start a second response, whose error ends its watch over all requests."""
        if self._response_started and self.channel is not None:
            self.channel.forceAbortClient()
        else:
            super().handle_exception(exception)

    def pauseProducing(self) -> None:
        """Twisted's buffer is full."""
        self.can_write.clear()

    def resumeProducing(self) -> None:
        self.can_write.set()

    def stopProducing(self) -> None:
        self.can_write.set()

    def finish(self) -> None:
        if self.producer:
            self.unregisterProducer()
        super().finish()

    def connectionLost(self, reason: object) -> None:
        self.can_write.set()
        super().connectionLost(reason)

    def reject_request(self) -> None:
        if self.is_rejected:
            return
        self.is_rejected = True
        # The upload pages read the same JSON as clients of the API
        build_body = error_body if self.channel._path.startswith(b"/v1/") else problem_body
        body = json.dumps(build_body(self.rejection.message)).encode()
        status = HTTPStatus(self.rejection.status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.channel.transport.write(head.encode() + body)
        self.channel.loseConnection()


class WaitingServer(Server):  # type: ignore[misc]
    """Daphne's server, which waits until the client has taken what was sent before, and ends the
    connection of a client that takes nothing for SEND_TIMEOUT.
    """

    async def handle_reply(self, protocol: Any, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await wait_until_writable(protocol)
        except TimeoutError:
            protocol.transport.abortConnection()
        await super().handle_reply(protocol, message)


async def wait_until_writable(protocol: Any) -> None:
    if isinstance(protocol, LimitedRequest):
        await protocol.can_write.wait()
        return
    while protocol.is_write_paused:
        await asyncio.sleep(SOCKET_POLL_SECONDS)


if __name__ == "__main__":
    # Twisted spools to files; /tmp may be in memory
    tempfile.tempdir = settings.FILE_UPLOAD_TEMP_DIR
    http_protocol.WebRequest = LimitedRequest
    WebSocketFactory.protocol = LimitedWebSocket
    CommandLineInterface.server_class = WaitingServer
    CommandLineInterface.entrypoint()
