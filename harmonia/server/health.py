"""`/health`: 200 only where paths can really be served just now. `/version`: what serves them."""

from sanic import Request

from harmonia import __version__
from harmonia.server.body import Representation
from harmonia.server.cache import Cache

_TEXT = "text/plain; charset=utf-8"


async def get(cache: Cache, _: Request) -> Representation:
    await cache.query(cache.store.check)
    return Representation(content_type=_TEXT, body=b"ok\n", cache_control="no-store")


async def get_version(_: Cache, __: Request) -> Representation:
    return Representation(content_type=_TEXT, body=f"harmonia {__version__}\n".encode(), cache_control="no-cache")
