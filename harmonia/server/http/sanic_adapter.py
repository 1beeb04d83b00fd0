"""Private parts of Sanic and uvloop that Harmonia relies on. No other module may use any.

`tests/server/test_sanic_internals.py` names each, and fails with that name if an upgrade takes it away. Together with
`request_head.py`, which replaces how Sanic reads the head of a request, this is where to look when Sanic changes.
"""

import fcntl
import re
import sys
import termios
import time
from binascii import unhexlify
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from sanic import Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.http import Stage
from sanic.http.constants import HTTP
from sanic.server.protocols.http_protocol import HttpProtocol

from harmonia.server.http.request_head import Http

if TYPE_CHECKING:
    import asyncio

    from sanic.models.server_types import ConnInfo
    from sanic.response import BaseHTTPResponse

    from harmonia.server.connections import ConnectionLimiter

_CLOSE_POLL_S = 0.05
_FULL = (  # no body: it may be the answer to HEAD
    b"HTTP/1.1 503 Service Unavailable\r\ncache-control: no-store\r\nretry-after: 1\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)

_BEFORE_PATH = re.compile(rb"\A(?:https?://[^/?]+)?/*", re.IGNORECASE)
"""Nix 2.8 asks for `//nix-cache-info` if the URL that it has ends in a slash."""
_UNRESERVED = re.compile(rb"%(2[DE]|3\d|[46][1-9A-F]|[57][\dA]|5F|7E)", re.IGNORECASE)
"""Octets whose encoding makes no difference (RFC 3986 section 6.2.2.2)."""


def _decoded(octet: re.Match[bytes]) -> bytes:
    return unhexlify(octet[1])


class AdaptedRequest(Request):
    """Sanic's. For an answer to a URL that cannot be parsed, Sanic makes a request of it, which cannot be either."""

    def __init__(self, *, url_bytes: bytes, method: str, **rest: Any) -> None:  # noqa: ANN401 (as Sanic gives them)
        target = b"*" if method == "NONE" or url_bytes == b"*" else _BEFORE_PATH.sub(b"/", url_bytes, 1)
        super().__init__(url_bytes=_UNRESERVED.sub(_decoded, target), method=method, **rest)

    async def respond(self, response: "BaseHTTPResponse | None" = None, **rest: Any) -> Any:  # noqa: ANN401
        """Every response comes through here."""
        if response is not None:
            response.headers["date"] = date()
            if any("harmonia" in via for via in self.headers.getall("via", ())):  # to tell it which Harmonia it asked
                response.headers["via"] = f"1.1 {self.app.ctx.identity}"
        return await super().respond(response, **rest)


def date() -> str:
    """Return the value of the header Date, which each response has (RFC 9110 section 6.6.1)."""
    return _date(int(time.time()))


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def reader_of(request: Request) -> Http:
    """Return what reads requests from the connection, and writes responses to it."""
    return cast("Http", request.stream)


def connection_of(request: Request) -> "ConnInfo | None":
    """Return addresses and TLS of the connection, or None if it is lost."""
    return reader_of(request).protocol.conn_info


def began_at(request: Request) -> float | None:
    """Return the value of `perf_counter` when the head of the request was read, or None if it never was."""
    return cast("float | None", reader_of(request).perft0)


def response_of(request: Request) -> "BaseHTTPResponse":
    """Return the response that was sent for a request."""
    return reader_of(request).response


def prepare(app: "Sanic[Any, Any]", *, primary: bool) -> None:
    """Set what Sanic's own start would set. Only one application of a process may be the primary one."""
    # Sanic looks there to see that nobody serves HTTP/3, and leaves out Alt-Svc.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    app.state.primary = primary  # what Sanic does to its own code at the start, it can do only once


class Connection(HttpProtocol):
    """Sanic's, where the time for a head is for all of it: Sanic itself begins it anew with each byte that comes.

    A question that was answered before does not go through Sanic at all.
    """

    HTTP_CLASS = Http
    __slots__ = ("_closing",)

    def data_received(self, data: bytes) -> None:
        http = getattr(self, "_http", None)  # it comes with the connection's task
        if http is not None and self._is_idle(http) and (answer := self.app.ctx.response_cache.cached_response(data)):
            cast("asyncio.WriteTransport", self.transport).write(answer)
            self._time = time.monotonic()
            return
        began = self._time
        super().data_received(data)
        if http is not None and http.stage is Stage.REQUEST:
            self._time = began

    def _is_idle(self, http: Http) -> bool:
        """Whether a request can be answered here and now: it is the first that waits, and the client reads."""
        return (
            http.stage is Stage.IDLE
            and http.keep_alive
            and not (self.recv_buffer or http.request_body)
            and self._can_write.is_set()
            and not (self.transport is None or self.transport.is_closing())
        )

    def close(self, timeout: float | None = None) -> None:
        """Of TLS, Sanic sees only what is yet to be encrypted, and cuts off what the client is yet to take."""
        patience: float = self.app.config.GRACEFUL_TCP_CLOSE_TIMEOUT
        if not self._is_unsent() or time.monotonic() - self._time > patience:
            super().close(timeout)
        elif self.http is None and getattr(self, "_closing", None) is None:  # else who closes it tries again
            self._closing = self.loop.call_later(_CLOSE_POLL_S, self._close_again)

    def _close_again(self) -> None:
        self._closing = None
        self.close()

    def _is_unsent(self) -> bool:
        """Whether the kernel has bytes of an encrypted connection that the client has not taken: only then, uvloop may
        have more.
        """
        transport = self.transport
        if transport is None or transport.is_closing() or transport.get_extra_info("ssl_object") is None:
            return False
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(count, sys.byteorder) > 0

    async def send(self, data: bytes) -> None:
        """Send bytes, and wait until the kernel has nearly all of them: what comes next is not in memory before."""
        await super().send(data)  # type: ignore[no-untyped-call]
        if self._http.request is not None:
            self.app.ctx.response_cache.remember(self._http.request, data)
        await self._can_write.wait()


def limited_connection(limiter: "ConnectionLimiter") -> type[Connection]:
    """Return the protocol of connections that the limiter counts. Those of TLS it has counted already."""

    class LimitedConnection(Connection):
        def connection_made(self, transport: Any) -> None:  # noqa: ANN401 (Sanic's own does not say)
            if self in limiter or limiter.admit(self, transport.get_extra_info("peername")):
                super().connection_made(transport)  # type: ignore[no-untyped-call]
            else:
                transport.write(_FULL)
                transport.close()

        def connection_lost(self, exc: Any) -> None:  # noqa: ANN401
            if self in limiter:
                limiter.release(self)
                super().connection_lost(exc)  # type: ignore[no-untyped-call]

    return LimitedConnection
