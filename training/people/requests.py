"""What all doors share: the type of a request that came through the login door, ids out of text,
and files in pieces.
"""

from collections.abc import AsyncIterator, Iterator
from functools import partial

from asgiref.sync import sync_to_async
from django.http import HttpRequest

from training.people.models import User


class AuthenticatedRequest(HttpRequest):
    user: User


def parse_id(text: str) -> int:
    """An id from an address or a form; 0, which no row has, for what is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0


async def async_chunks(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """One piece at a time; a plain iterator would be read whole into memory before the first byte
    is sent.
    """
    while chunk := await sync_to_async(partial(next, chunks, b""))():
        yield chunk
