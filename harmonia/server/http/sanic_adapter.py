"""Private parts of Sanic and uvloop that Harmonia relies on. Only this module and `request_head.py` may use them.

`tests/server/test_sanic_internals.py` names each part, and fails with that name if an upgrade removes it. Begin here
when Sanic changes. `request_head.py` replaces how Sanic parses the head of a request.
"""

import asyncio
import fcntl
import re
import sys
import termios
import time
from binascii import unhexlify
from collections.abc import AsyncGenerator
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from sanic import Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.exceptions import SanicException
from sanic.http import Stage
from sanic.http.constants import HTTP
from sanic.server.protocols.http_protocol import HttpProtocol

from harmonia.server.http.request_head import Http

if TYPE_CHECKING:
    from sanic.models.server_types import ConnInfo
    from sanic.response import BaseHTTPResponse

_CLOSE_POLL_S = 0.05
_UPLOAD_TIMEOUT_S = 30.0  # until Sanic gets an upload: its handlers have timeouts, and responses that show progress
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_BEFORE_PATH = re.compile(rb"\A(?:https?://[^/?]+)?/*", re.IGNORECASE)
"""Scheme, host and leading slashes: Nix 2.8 requests `//nix-cache-info` if the cache's URL ends in a slash."""
_UNRESERVED = re.compile(rb"%(2[DE]|3\d|[46][1-9A-F]|[57][\dA]|5F|7E)", re.IGNORECASE)
"""Percent-encoded unreserved characters: the encoding makes no difference (RFC 3986 section 6.2.2.2)."""


def _decoded(octet: re.Match[bytes]) -> bytes:
    return unhexlify(octet[1])


class AdaptedRequest(Request):
    """Sanic's request with a normalized target.

    For the error response to a target that it cannot parse, Sanic creates a request with the same target and the method
    NONE. The target is then replaced by `*`.
    """

    def __init__(self, *, url_bytes: bytes, method: str, **rest: Any) -> None:  # noqa: ANN401 (Sanic's signature)
        target = b"*" if method == "NONE" or url_bytes == b"*" else _BEFORE_PATH.sub(b"/", url_bytes, 1)
        super().__init__(url_bytes=_UNRESERVED.sub(_decoded, target), method=method, **rest)

    async def respond(self, response: "BaseHTTPResponse | None" = None, **rest: Any) -> Any:  # noqa: ANN401 (Sanic's signature)
        """Add Date, and Via if a Harmonia sent the request. Every response passes through this method."""
        if response is not None:
            response.headers["date"] = date()
            if any("harmonia" in via for via in self.headers.getall("via", ())):  # it learns our pseudonym
                response.headers["via"] = f"1.1 {self.app.ctx.identity}"
        return await super().respond(response, **rest)


def date() -> str:
    """Return the value of the header Date for now (RFC 9110 section 6.6.1)."""
    return _date(int(time.time()))


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def reader_of(request: Request) -> Http:
    """Return Sanic's reader and writer of the request's connection."""
    return cast("Http", request.stream)


def connection_of(request: Request) -> "ConnInfo | None":
    """Return the addresses and TLS state of the connection, or None if it is closed."""
    return reader_of(request).protocol.conn_info


def began_at(request: Request) -> float | None:
    """Return `perf_counter()` at the time when the head of the request was read, or None if it was not read."""
    return cast("float | None", reader_of(request).perft0)


def field_value(request: Request, name: str) -> str:
    """Return the value of a field, with all its lines joined (RFC 9110 section 5.3). Empty if it is missing."""
    return ",".join(request.headers.getall(name, []))


async def body_of(request: Request, stall_s: float) -> AsyncGenerator[bytes]:
    """Yield the body of a request to a route for streams, as it arrives.

    Raises TimeoutError if no byte arrives for `stall_s` seconds. If the body is not read to its end, the connection is
    closed after the response.
    """
    http = reader_of(request)
    http.accept_body()
    try:
        while http.request_body:
            async with asyncio.timeout(stall_s):
                data = await http.read()
            if data:
                yield data
    finally:
        if http.request_body:
            http.keep_alive = False


async def drop_body(request: Request, most: int, stall_s: float) -> None:
    """Read and drop the rest of a body before an error response: clients read no response while they send.

    Does nothing if the client waits for a response before it sends (Expect), or would send more than `most` bytes.
    """
    http = reader_of(request)
    if not http.request_body:
        return
    http.keep_alive = False
    if not http.is_awaited and (http.request_bytes_left or 0) <= most:
        with suppress(TimeoutError, SanicException):
            async with asyncio.timeout(stall_s):
                while http.request_body:
                    await http.read()
    http.request_body = None


def certificate_name(request: Request) -> str | None:
    """Return the common name of the verified certificate of the client, or None without one."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    names = (part for parts in (certificate or {}).get("subject", ()) for part in parts)
    return next((value for name, value in names if name == "commonName"), None)


def response_of(request: Request) -> "BaseHTTPResponse":
    """Return the response that was sent for a request."""
    return reader_of(request).response


def prepare(app: "Sanic[Any, Any]", *, primary: bool) -> None:
    """Set the state that `Sanic.run` would set. Only one application of a process may be `primary`."""
    # Sanic reads this to learn that there is no HTTP/3, and sends no Alt-Svc.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    app.state.primary = primary  # Sanic patches its own code for the primary application, which works only once


class Upload(Protocol):
    """An upload that is stored without Sanic (`small_uploads.py`)."""

    is_awaited: bool
    """True if the client waits for 100 Continue before it sends the body."""
    left: int
    """The number of bytes of the body that are missing."""
    rest: bytes
    """The bytes after the body: the client sends its next request before the response."""

    @property
    def received(self) -> bytes:
        """Return the request so far, for Sanic, without Expect: it was answered."""

    def receive(self, data: bytes) -> None:
        """Append bytes of the body, or after it."""

    async def store(self) -> None:
        """Store the whole body. Raises any error."""

    def response(self) -> bytes:
        """Return and count the response to an upload that was stored."""


class Connection(HttpProtocol):
    """Sanic's protocol with a timeout for the whole head. Sanic itself restarts the timeout with each byte.

    A request that resembles an earlier one may be answered here, without Sanic.
    """

    HTTP_CLASS = Http
    __slots__ = ("_closing", "_storing", "_upload", "_upload_timeout")
    _upload: Upload | None
    """The upload that is received without Sanic. Meanwhile, Sanic waits for the next request."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 (Sanic's signature)
        super().__init__(**options)
        self._upload = None

    def data_received(self, data: bytes) -> None:
        if (upload := self._upload) is not None:
            is_being_stored = not upload.left
            upload.receive(data)
            if not is_being_stored:
                self._advance_upload(upload)
            elif self.transport is not None:
                self.transport.pause_reading()  # the next requests wait in the kernel
            return
        if self._is_idle():
            if data.startswith(b"PUT "):  # the cache would hash the whole body
                if self.http is not None and (upload := self.app.ctx.small_uploads.begin(data)):
                    self._begin_upload(upload)
                    return
            elif response := self.app.ctx.response_cache.response(data):
                cast("asyncio.WriteTransport", self.transport).writelines(response)
                self._time = time.monotonic()
                return
        began = self._time
        super().data_received(data)
        if self.http is not None and self.http.stage is Stage.REQUEST:
            self._time = began

    def _begin_upload(self, upload: Upload) -> None:
        self._upload = upload
        self._http.stage = Stage.HANDLER  # so that Sanic's timeouts and a shutdown wait
        self._upload_timeout = self.loop.call_later(_UPLOAD_TIMEOUT_S, self._leave_upload_to_sanic)
        if upload.is_awaited and upload.left:
            cast("asyncio.WriteTransport", self.transport).write(_CONTINUE)
        self._advance_upload(upload)

    def _advance_upload(self, upload: Upload) -> None:
        if not upload.left:
            self._storing = self.loop.create_task(self._store_upload(upload))

    async def _store_upload(self, upload: Upload) -> None:
        """Store an upload, and answer it, or leave it to Sanic if it fails. Continue if the client disconnects."""
        try:
            await upload.store()
        except Exception:  # noqa: BLE001 (the handler meets the same error, and gives it a status)
            if self._upload is upload:
                self._leave_upload_to_sanic()
            return
        if self._upload is not upload:
            return
        self._end_upload()
        transport = cast("asyncio.Transport", self.transport)
        transport.write(upload.response())
        self._time = time.monotonic()
        if upload.rest:
            transport.resume_reading()
            self.data_received(upload.rest)

    def _leave_upload_to_sanic(self) -> None:
        upload = self._upload
        self._end_upload()
        if upload is not None:
            super().data_received(upload.received)

    def _end_upload(self) -> None:
        if self._upload is not None:
            self._upload = None
            self._upload_timeout.cancel()
            if self.http is not None:
                self.http.stage = Stage.IDLE

    def connection_lost(self, exc: Any) -> None:  # noqa: ANN401 (asyncio's signature)
        self._end_upload()
        super().connection_lost(exc)  # type: ignore[no-untyped-call]

    def _is_idle(self) -> bool:
        """Return True if a request can be answered at once: no other is pending, and the client reads."""
        if hasattr(self, "_http"):  # the connection's task has started
            http = self._http
            if http is None or http.stage is not Stage.IDLE or not http.keep_alive or http.request_body:
                return False
        return (
            not self.recv_buffer
            and self._can_write.is_set()
            and not (self.transport is None or self.transport.is_closing())
        )

    def close(self, timeout: float | None = None) -> None:
        """Close the connection when its last bytes are sent.

        With TLS, Sanic sees only the bytes that are not encrypted yet, and would drop encrypted bytes that the client
        has not read.
        """
        patience: float = self.app.config.GRACEFUL_TCP_CLOSE_TIMEOUT
        if not self._is_unsent() or time.monotonic() - self._time > patience:
            super().close(timeout)
        elif self.http is None and getattr(self, "_closing", None) is None:  # otherwise, the caller calls `close` again
            self._closing = self.loop.call_later(_CLOSE_POLL_S, self._close_again)

    def _close_again(self) -> None:
        self._closing = None
        self.close()

    def _is_unsent(self) -> bool:
        """Return True if the kernel has unsent bytes of a TLS connection. Only then may uvloop have more."""
        transport = self.transport
        if transport is None or transport.is_closing() or transport.get_extra_info("ssl_object") is None:
            return False
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(count, sys.byteorder) > 0

    async def send(self, data: bytes) -> None:
        """Send bytes, and wait until the kernel has nearly all of them, so that the next ones are read only then."""
        await super().send(data)  # type: ignore[no-untyped-call]
        if self._http.request is not None:
            self.app.ctx.response_cache.remember(self._http.request, data)
            self.app.ctx.small_uploads.remember(self._http.request, data)
        await self._can_write.wait()
