"""Request bodies that stay on disk: daphne queues file positions instead of bytes, and a chunk is
read when Django asks for it.
"""

from __future__ import annotations

from typing import Any

CHUNK_BYTES = 2**20  # 2 GiB are 2,048 entries in the queue


class FileChunk(bytes):
    """A chunk of a spooled body, by its position. Its length is the number of bytes, because daphne
    detects the last chunk by its length.
    """

    file: Any
    offset: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return self.size > 0

    def read_bytes(self) -> bytes:
        self.file.seek(self.offset)
        return bytes(self.file.read(self.size))


class SpooledFile:
    """Twisted's spool file; `read` returns FileChunks instead of bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.offset = file, 0
        file.seek(0, 2)
        self.total_bytes = file.tell()

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def seek(self, offset: int, _whence: int = 0) -> None:
        self.offset = offset

    def close(self) -> None:
        self.file.close()

    def read(self, _size: int = -1) -> FileChunk:
        chunk = FileChunk()
        chunk.file, chunk.offset, chunk.size = (
            self.file,
            self.offset,
            min(CHUNK_BYTES, self.total_bytes - self.offset),
        )
        self.offset += chunk.size
        return chunk


class SpooledBodyMiddleware:
    """ASGI middleware that reads FileChunks from disk, one at a time."""

    def __init__(self, application: Any) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        async def receive_chunk() -> Any:
            message = await receive()
            body = message.get("body")
            return (
                {**message, "body": body.read_bytes()} if isinstance(body, FileChunk) else message
            )

        return await self.application(
            scope, receive_chunk if scope["type"] == "http" else receive, send
        )
