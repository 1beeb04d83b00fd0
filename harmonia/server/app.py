"""The routes, and the Sanic application made of them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.config import Config
from sanic.http.constants import HTTP

from harmonia.nix.base32 import ALPHABET
from harmonia.server import access_log, cache_info, errors, health, landing, listing, nar, narinfo
from harmonia.server.body import Representation, respond
from harmonia.server.cache import Cache

Handler = Callable[..., Awaitable[Representation]]

_HASH_PART = f"(?P<hash_part>[{ALPHABET}]{{32}})"

_ROUTES: dict[str, Handler] = {
    "/": landing.get,
    "/nix-cache-info": cache_info.get,
    rf"/<hash_part:{_HASH_PART}\.narinfo>": narinfo.get,
    rf"/<hash_part:{_HASH_PART}\.ls>": listing.get,
    "/nar/<name:str>": nar.get,
    "/version": health.get_version,
    "/health": health.get,
}

_CONFIG: dict[str, Any] = {
    "KEEP_ALIVE_TIMEOUT": 120,  # Nix keeps connections idle between two steps of a build
    "REQUEST_TIMEOUT": 30,  # for the whole head
    # Sanic's stall timer: Nix stops reading for minutes while it unpacks. Who is gone, the kernel knows (sockets.py).
    "RESPONSE_TIMEOUT": 3600,
    "GRACEFUL_TCP_CLOSE_TIMEOUT": 3600,  # likewise, for the tail of a body on a connection that then closes
    "REQUEST_MAX_SIZE": 64 * 1024,  # nobody uploads
    "ACCESS_LOG": False,
    "MOTD": False,
}


class _Request(Request):
    """Sanic's. For an answer to a URL that cannot be parsed, Sanic makes a request of it, which cannot be either."""

    def __init__(self, *, url_bytes: bytes, method: str, **rest: Any) -> None:  # noqa: ANN401 (as Sanic gives them)
        super().__init__(url_bytes=b"*" if method == "NONE" else url_bytes, method=method, **rest)


def create_app(cache: Cache) -> "Sanic[Any, Any]":
    app = Sanic("harmonia", config=Config(_CONFIG, env_prefix=None), configure_logging=False, request_class=_Request)
    # What Sanic's own start would note. It looks there to see that nobody serves HTTP/3, and leaves out Alt-Svc.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    for uri, handler in _ROUTES.items():
        name = f"{handler.__module__}.{handler.__name__}".replace(".", "_")
        app.add_route(_endpoint(cache, handler), uri, methods=("GET", "HEAD"), name=name, strict_slashes=True)
    app.error_handler.add(Exception, lambda request, error: _logged(cache, request, errors.response(request, error)))
    return app


def _endpoint(cache: Cache, handler: Handler) -> Callable[..., Coroutine[Any, Any, HTTPResponse | None]]:
    async def endpoint(request: Request, **parameters: str) -> HTTPResponse | None:
        try:
            representation = await handler(cache, request, **parameters)
            response = await respond(request, representation, cache.readers)
        except Exception as error:  # noqa: BLE001 (errors.py tells each its status)
            response = errors.response(request, error)
        except asyncio.CancelledError:  # the client is gone, perhaps with all that it wanted, or we are told to stop
            if request.responded:
                _logged(cache, request, None)
            raise
        return _logged(cache, request, response)

    return endpoint


def _logged(cache: Cache, request: Request, response: HTTPResponse | None) -> HTTPResponse | None:
    access_log.log(request, response, cache.settings.trusted_proxies)
    return response
