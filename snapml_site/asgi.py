"""The ASGI application of the web server: HTTP goes to Django, `/v1/` to the gateway of the
deployments, WebSockets to the consumers.
"""

import os
from typing import Any

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "snapml_site.settings")
django_application = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402

from adapters.serving.gateway import application as gateway  # noqa: E402
from snapml_site.header_middleware import HeaderMiddleware  # noqa: E402
from snapml_site.routing import SameOriginOnly, websocket_urlpatterns  # noqa: E402
from snapml_site.spooled_body import SpooledBodyMiddleware  # noqa: E402

routes = ProtocolTypeRouter(
    {
        "http": SpooledBodyMiddleware(django_application),
        "websocket": SameOriginOnly(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
    }
)
router = HeaderMiddleware(routes)


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Dispatch a request. `root_path` is reset, since any client may send `Daphne-Root-Path`, which
    would change every URL.
    """
    is_gateway_request = scope["type"] == "http" and f"{scope['path']}/".startswith("/v1/")
    await (gateway if is_gateway_request else router)({**scope, "root_path": ""}, receive, send)
