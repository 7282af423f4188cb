"""Request bodies that stay on disk: daphne queues where a piece lies, and it is read when Django
asks for it.
"""

from __future__ import annotations

from typing import Any

PIECE_BYTES = 2**20  # 2 GiB are 2,048 places in the queue


class Place(bytes):
    """A piece of a spooled body, by its place; it says its length, so that daphne can tell the last
    one.
    """

    file: Any
    at: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return self.size > 0

    def load(self) -> bytes:
        self.file.seek(self.at)
        return bytes(self.file.read(self.size))


class OnDisk:
    """Twisted's spool file, whose `read` gives places instead of bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.at = file, 0
        file.seek(0, 2)
        self.total = file.tell()

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def seek(self, at: int, _whence: int = 0) -> None:
        self.at = at

    def close(self) -> None:
        self.file.close()

    def read(self, _size: int = -1) -> Place:
        place = Place()
        place.file, place.at, place.size = (
            self.file,
            self.at,
            min(PIECE_BYTES, self.total - self.at),
        )
        self.at += place.size
        return place


class ReadLater:
    """The ASGI application, with places turned into bytes one at a time."""

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        async def read() -> Any:
            message = await receive()
            body = message.get("body")
            return {**message, "body": body.load()} if isinstance(body, Place) else message

        return await self.application(scope, read if scope["type"] == "http" else receive, send)
