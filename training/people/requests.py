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
    """The address for which a client's attempts count; of IPv6 the network, since a client has all
    addresses of its /64. Empty if it is unknown.

    Each of SNAPML_PROXIES appends its peer to `X-Forwarded-For`, so the list is read from the right
    up to the first address that is no proxy. A loopback address is that of a proxy that is not
    configured: it stands for all clients.
    """
    forwarded = str(request.META.get("HTTP_X_FORWARDED_FOR", ""))
    for hop in (str(request.META.get("REMOTE_ADDR", "")), *reversed(forwarded.split(","))):
        address = parse_address(hop)
        if address is None or not any(address in network for network in settings.PROXIES):
            break
    else:
        return ""
    if address is None or address.is_loopback:
        return ""
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse the address of a hop, which may have brackets, a port and a zone. Returns None if there
    is no address.
    """
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


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
