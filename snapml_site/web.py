"""`python -m snapml_site.web`: daphne, with a limit on bodies that holds while they arrive.

Daphne spools a whole request to disk before Django sees its first byte, so a stranger could fill the disk; here a request that
says or turns out to be too long is cut off at once.
"""

from __future__ import annotations

import django
from daphne import http_protocol
from daphne.cli import CommandLineInterface

django.setup()

from django.conf import settings  # noqa: E402

UPLOAD_PATHS = (b"/data/new", b"/api/v1/datasets/uploads")
FORM_BYTES = 2**20


class LimitedRequest(http_protocol.WebRequest):  # type: ignore[misc]
    """Twisted calls `gotLength` after the headers and `handleContentChunk` for every piece of the body."""

    received = 0
    refused = False

    def most_bytes(self) -> int:
        path = self.channel._path.partition(b"?")[0]
        return FORM_BYTES + (settings.DATASET_MAX_BYTES if path in UPLOAD_PATHS else 0)

    def gotLength(self, length: int | None) -> None:
        super().gotLength(length)
        if length is not None and length > self.most_bytes():
            self.refuse()

    def handleContentChunk(self, data: bytes) -> None:
        self.received += len(data)
        if self.refused or self.received > self.most_bytes():
            self.refuse()
        else:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        if not self.refused:
            super().requestReceived(command, path, version)

    def refuse(self) -> None:
        if self.refused:
            return
        self.refused = True
        self.channel.transport.write(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.channel.transport.loseConnection()


if __name__ == "__main__":
    http_protocol.WebRequest = LimitedRequest
    CommandLineInterface.entrypoint()
