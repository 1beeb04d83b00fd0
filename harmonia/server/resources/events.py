"""`/events`: a stream of server-sent events, for people and programs that follow a cache. Only if `browse` is set."""

import math
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, cast

from sanic import Request
from sanic.exceptions import BadRequest, NotFound

from harmonia.server.context import ServerContext
from harmonia.server.events import NAMES, Events, Listener
from harmonia.server.http.negotiation import NotAcceptable, accepts
from harmonia.server.http.response import Representation
from harmonia.server.http.sanic_adapter import field_value
from harmonia.store.file_reader import ReadOnly
from harmonia.untrusted import integer

if TYPE_CHECKING:
    import asyncio

    from harmonia.config.tokens import Token

_CONTENT_TYPE = "text/event-stream"
_MAX_NUMBER = 2**53


class _Stream(ReadOnly):
    """The body: events until the client disconnects, or the worker stops."""

    size = None

    def __init__(self, events: Events, listener: Listener) -> None:
        self._events = events
        self._listener = listener

    def read(self, start: int, stop: int | None) -> AsyncGenerator[bytes]:  # noqa: ARG002 (a stream has no positions)
        return self._events.listen(self._listener)


async def get(context: ServerContext, request: Request) -> Representation:
    if not context.settings.browse:
        raise NotFound
    names = request.args.getlist("event", NAMES)
    if not set(names) <= set(NAMES):
        raise BadRequest
    if request.version == "1.0" or not accepts(field_value(request, "accept"), _CONTENT_TYPE):
        raise NotAcceptable  # HTTP/1.0 has no chunked coding

    def abort() -> None:
        if request.transport is not None:
            cast("asyncio.WriteTransport", request.transport).abort()

    last = request.headers.get("last-event-id", "")
    token: Token | None = getattr(request.ctx, "token", None)
    until = token.expires_at if token is not None else math.inf
    listener = Listener(context.client(request), names, integer(last, _MAX_NUMBER), abort, until)
    return Representation(
        content_type=_CONTENT_TYPE,
        body=_Stream(context.events, listener),
        cache_control="no-store",
        headers={"x-accel-buffering": "no"},  # nginx sends each event at once
        resumable=False,
    )
