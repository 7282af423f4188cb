"""The web server's one application: HTTP to Django, deployments' `/v1/` to their gateway,
WebSockets to the consumers.
"""

import os
from typing import Any

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "snapml_site.settings")
http = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402

from adapters.serving.gateway import application as gateway  # noqa: E402
from snapml_site.bodies import ReadLater  # noqa: E402
from snapml_site.sockets import SameOriginOnly, socket_urls  # noqa: E402

router = ProtocolTypeRouter(
    {
        "http": ReadLater(http),
        "websocket": SameOriginOnly(AuthMiddlewareStack(URLRouter(socket_urls))),
    }
)


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Any client may send `Daphne-Root-Path`, which would move every address: the site always
    stands at the root.
    """
    to_deployments = scope["type"] == "http" and scope["path"].startswith("/v1/")
    await (gateway if to_deployments else router)({**scope, "root_path": ""}, receive, send)
