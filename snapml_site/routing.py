"""WebSocket routes and the check of their origin."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from channels.security.websocket import WebsocketDenier
from django.conf import settings
from django.urls import path, re_path

from snapml_site.header_middleware import is_allowed_host
from training.runs.live.consumers import LiveConsumer

websocket_urlpatterns = [
    path("ws/live", LiveConsumer.as_asgi()),
    re_path("", WebsocketDenier.as_asgi()),  # Without it another path is a 500 with a traceback
]


class SameOriginOnly:
    """Rejects handshakes whose Origin is not the site's own scheme, host and port.

    Channels' AllowedHostsOriginValidator accepts any port of an allowed host, so a notebook server
    on the same machine could open a socket with the visitor's cookie.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> Any:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin1")
        host = headers.get(b"host", b"").decode("latin1")
        if not is_same_origin(origin, host):
            return await WebsocketDenier()(scope, receive, send)
        return await self.inner(scope, receive, send)


def is_same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:  # an unclosed bracket
        return False
    scheme = "https" if settings.HTTPS else "http"
    return parts.scheme == scheme and parts.netloc == host and is_allowed_host(host)
