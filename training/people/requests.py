"""Helpers for views: the type of an authenticated request, the client's address, ids from text, and
async streams.
"""

import ipaddress
from collections.abc import AsyncIterator, Iterator
from functools import partial

from asgiref.sync import sync_to_async
from django.conf import settings
from django.http import HttpRequest

from training.people.models import User


class AuthenticatedRequest(HttpRequest):
    """A request whose user is signed in; the middleware guarantees it."""

    user: User


def get_client_address(request: HttpRequest) -> str:
    """The address of the client. A proxy on this host, or at one of SNAPML_PROXIES, appends the
    client's address to `X-Forwarded-For`; without it the address is unknown and empty.
    """
    address = str(request.META.get("REMOTE_ADDR") or "")
    if not (address in settings.PROXIES or is_loopback(address)):
        return address
    return str(request.META.get("HTTP_X_FORWARDED_FOR", "")).rpartition(",")[2].strip()[:64]


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def parse_int_or_zero(text: str) -> int:
    """Parse an id, a count or a page from a URL or form. Returns 0 if the text is no positive
    integer; no row has the id 0.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0


async def async_chunks(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Iterate asynchronously. Django would read a plain iterator completely into memory before it
    sends the first byte.
    """
    while chunk := await sync_to_async(partial(next, chunks, b""))():
        yield chunk
