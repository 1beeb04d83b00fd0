"""`/robots.txt` and `/favicon.ico`, which crawlers and browsers request without a link."""

from sanic import Request

from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation

_MAX_AGE_S = 86400

# Only the page at `/`: each of the others costs work, and a crawler would download the whole store (RFC 9309, 2.2.3).
_ROBOTS = b"User-agent: *\nAllow: /$\nDisallow: /\n"


async def get_robots(_: ServerContext, __: Request) -> Representation:
    return Representation.of_metadata("text/plain; charset=utf-8", _ROBOTS, _MAX_AGE_S)


async def get_icon(_: ServerContext, __: Request) -> Representation:
    return Representation.of_metadata("image/svg+xml", page.ICON, _MAX_AGE_S)
