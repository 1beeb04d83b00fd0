"""How a representation becomes a response: conditions, encodings, ranges, HEAD, and the one pump for streamed bodies.

RFC 9110 sections 8.4, 12.5.3, 13 and 14. A body that fails half-way ends in a broken connection, never in a short one
that looks complete.
"""

import asyncio
import logging
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any, Protocol, cast

from sanic import HTTPResponse, Request
from sanic.exceptions import NotFound, RangeNotSatisfiable, SanicException

from harmonia.errors import StoreObjectError
from harmonia.server.http import byte_range
from harmonia.server.http.negotiation import prefers_zstd
from harmonia.server.http.response_cache import StillValid
from harmonia.store.file_reader import CHUNK_BYTES, OpenSlice

IMMUTABLE = "public, max-age=31536000, immutable"
IMMUTABLE_NAR = f"{IMMUTABLE}, no-transform"
"""For what is compressed, or need not be: a proxy that compresses it takes its ranges away."""
UNNAMED = "no-store, no-transform"
"""For a URL that does not name its bytes: an HTTP cache could answer ranges of it from two files."""

_TAG = re.compile(r'(?:W/)?"[!#-~\x80-\xff]*"')
_PACKET_BYTES = 1400  # bytes; what is no longer than that takes no less time when it is compressed
_GATHER_S = 0.001  # seconds for which what is there already waits for more
_MAX_POLL_S = 0.02  # seconds until we look again for bytes that are still to be made
_LENGTH_WAIT_S = 0.25  # for which a range waits for the length of what is still being made

_log = logging.getLogger("harmonia")


Chunk = bytes | OpenSlice | Future[bytes] | None


class Body(Protocol):
    """Bytes that are read when they are wanted, by a thread."""

    @property
    def size(self) -> int | None:
        """How many they are, None as long as that is not known."""

    def read(self, start: int, stop: int | None) -> Generator["Chunk"]:
        """The bytes from `start` to `stop`, or to the end, in chunks; None whenever there are none yet.

        An open slice is read to its end, and a future waited for, before the generator goes on.
        """


Open = Callable[[Request], Awaitable[Body]]
"""Makes a body when it is known to be wanted. For HEAD it is only asked for its size."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body in the content coding zstd. `name` tells how it is encoded from every other way to do it."""

    name: str
    open: Open


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """What a resource has to say, whatever the method and the conditions of the request (RFC 9110 section 3.2)."""

    content_type: str
    body: bytes | Body | Open
    cache_control: str
    etag: str | None = None
    zstd: Encoded | None = None
    """The same encoded, for those who accept that. Its ETag is then another one."""
    worthwhile: bool = True
    """Whether to encode it where nobody insists."""
    status: HTTPStatus = HTTPStatus.OK
    """Another one only for a body of bytes."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further ones, by lower-case name."""
    resumable: bool = True
    """Whether the URL names these very bytes. Otherwise a range is 404, unless If-Range names them."""
    still_valid: StillValid | None = None
    """True while this response may be replayed to an identical request. Allowed only for in-memory bodies; must be
    cheap, and must not widen access.
    """


Handler = Callable[..., Awaitable[Representation]]
"""Answers for a resource: takes the context, the request and the parameters of the URI."""


Submit = Callable[..., "Future[Any]"]
"""Runs a function in a thread of those that the client of a request may have."""


async def respond(request: Request, representation: Representation, submit: Submit) -> HTTPResponse | None:
    """The response to return to Sanic, or None where it has been sent already.

    An error is raised only before the first byte; after it, the connection is broken.
    """
    headers = {"cache-control": representation.cache_control, "content-type": representation.content_type}
    headers |= representation.headers
    body, etag = representation.body, representation.etag
    if representation.zstd is not None:
        headers["vary"] = "Accept-Encoding"
        if _is_encoded(request, representation):
            headers["content-encoding"] = "zstd"
            body = representation.zstd.open
            etag = etag and f'{etag[:-1]}-encoded-{representation.zstd.name}"'
    if etag is not None:
        headers["etag"] = etag
    if representation.status == HTTPStatus.OK and _is_unmodified(request, etag):
        kept = {name: value for name, value in headers.items() if not name.startswith("content-")}
        return HTTPResponse(status=HTTPStatus.NOT_MODIFIED, headers=kept)
    if isinstance(body, bytes):
        headers["content-length"] = str(len(body))
        return HTTPResponse(None if request.method == "HEAD" else body, representation.status, headers)
    if "content-encoding" not in headers:
        headers["accept-ranges"] = "bytes" if representation.resumable else "none"
        if not representation.resumable and wants_part(request) and "if-range" not in request.headers:
            raise NotFound
    return await _respond_with(request, await body(request) if callable(body) else body, headers, submit)


async def _respond_with(request: Request, body: Body, headers: dict[str, str], submit: Submit) -> HTTPResponse | None:
    wanted = _wanted(request, headers)
    chunks = None
    if body.size is None and not isinstance(body, Unread) and (wanted is not None or request.version == "1.0"):
        chunks = await _reached(body, wanted, submit, needs_length=request.version == "1.0")
    status = HTTPStatus.OK
    start, stop = 0, body.size
    if wanted is not None:
        status = HTTPStatus.PARTIAL_CONTENT
        start, stop = _located(wanted, body.size)
        last = wanted.last or byte_range.UNKNOWN_LAST if stop is None else stop - 1
        headers["content-range"] = f"bytes {start}-{last}/{'*' if body.size is None else body.size}"
        if stop is None:
            headers["cache-control"] = UNNAMED  # an HTTP cache could take what came for all of the range
    if stop is not None:
        headers["content-length"] = str(stop - start)
    if request.method != "HEAD":
        size = None if stop is None else stop - start
        response = HTTPResponse(status=status, headers=headers)
        await _pump(request, response, chunks or _ReadAhead(body.read(start, stop), submit), size)
        return None
    if stop is not None:
        return HTTPResponse(status=status, headers=headers)
    if request.version != "1.0":
        headers["transfer-encoding"] = "chunked"
    return _HeadOfUnknownLength(headers=headers)


async def _reached(
    body: Body, wanted: byte_range.Wanted | None, submit: Submit, *, needs_length: bool
) -> "_ReadAhead | None":
    """Wait until a body of unknown length is made so far that it can be answered.

    That is to its end for a whole body, for the last bytes of one, and for an open range that needs a length. Any other
    range begins when its first byte is there, or its last byte if it names that. Return the reader of an open range
    whose length is still unknown then.
    """
    if wanted is not None and wanted.first is not None and not (wanted.is_open and needs_length):
        with suppress(TimeoutError):
            async with asyncio.timeout(_LENGTH_WAIT_S):
                await exhaust(body, submit)
        if body.size is not None:
            return None
        part = (wanted.first, None) if wanted.is_open else (wanted.last or 0, (wanted.last or 0) + 1)
        chunks = _ReadAhead(body.read(*part), submit)
        is_there = False
        try:
            is_there = bool(await chunks.peek())
        finally:
            if not (is_there and wanted.is_open):
                chunks.close()
        if is_there:
            return chunks if wanted.is_open else None
    if body.size is None:
        await exhaust(body, submit)
    return None


def _located(wanted: byte_range.Wanted, size: int | None) -> tuple[int, int | None]:
    """Return where a range starts and stops. It stops at None if that is an end that is not known yet."""
    if size is None:
        return wanted.first or 0, None if wanted.is_open else (wanted.last or 0) + 1
    try:
        return byte_range.located(wanted, size)
    except byte_range.UnsatisfiableError:
        raise RangeNotSatisfiable(headers={"content-range": f"bytes */{size}"}) from None


class _HeadOfUnknownLength(HTTPResponse):
    @property
    def processed_headers(self) -> Iterator[tuple[bytes, bytes]]:
        self.headers.pop("content-length")  # Sanic tells one of 0
        return super().processed_headers


def _is_encoded(request: Request, representation: Representation) -> bool:
    """Never parts: Nix counts the bytes of a range unencoded. Nor HTTP/1.0: it has no end for an unknown length."""
    plain = representation.body
    size = len(plain) if isinstance(plain, bytes) else None if callable(plain) else plain.size
    worthwhile = representation.worthwhile and (size is None or size > _PACKET_BYTES)
    sendable = not wants_part(request) and request.version != "1.0"
    return prefers_zstd(_field(request, "accept-encoding"), worthwhile=worthwhile and sendable)


def wants_part(request: Request) -> bool:
    """Return whether a Range counts, which it does for GET alone (RFC 9110 section 14.2)."""
    return request.method == "GET" and byte_range.is_one(_field(request, "range"))


def _field(request: Request, name: str) -> str:
    """Return the value of a field, in one line (RFC 9110 section 5.3), empty if it is not there."""
    return ",".join(request.headers.getall(name, []))


def _wanted(request: Request, headers: Mapping[str, str]) -> byte_range.Wanted | None:
    """Return the range to be sent, or None if that is the whole."""
    if request.method != "GET" or "content-encoding" in headers:
        return None
    return byte_range.wanted(_field(request, "range"), request.headers.get("if-range"), headers.get("etag"))


def _is_unmodified(request: Request, etag: str | None) -> bool:
    """Return whether the client has what it asks for. Raises 412 if it wants nothing but another representation.

    RFC 9110 section 13.2.2. Conditions on a date are ignored: nothing here has one (sections 13.1.3 and 13.1.4).
    """
    if "if-match" in request.headers and not _names(_field(request, "if-match"), etag, weakly=False):
        raise SanicException(status_code=HTTPStatus.PRECONDITION_FAILED)
    return "if-none-match" in request.headers and _names(_field(request, "if-none-match"), etag, weakly=True)


def _names(condition: str, etag: str | None, *, weakly: bool) -> bool:
    """Return whether a condition names this ETag; `*` is any, also if there is none."""
    tags = _TAG.findall(condition)
    return condition.strip(" \t") == "*" or etag in tags or (weakly and f"W/{etag}" in tags)


class _ReadAhead:
    """The chunks of a body. While one is sent, a thread reads the next: no more than these two are in memory.

    To wake a thread takes longer than to read what is small: one goes on with that until it has a chunk's worth. For
    the same reason, what the page cache has of open files is read at once.
    """

    def __init__(self, chunks: Generator[Chunk], submit: Submit) -> None:
        self._chunks = chunks
        self._submit = submit
        self._ready: deque[Chunk] = deque()
        self._slice: OpenSlice | None = None
        self._peeked: bytes | bytearray | None = None
        self._reading = self._pull()

    def _pull(self) -> "Future[Any]":
        return self._submit(_pull, self._chunks)

    async def peek(self) -> bytes | bytearray:
        """Return what `next` will return."""
        self._peeked = await self.next()
        return self._peeked

    async def next(self) -> bytes | bytearray:
        """The next chunk, empty after the last."""
        peeked, self._peeked = self._peeked, None
        return await self._next() if peeked is None else peeked

    async def _next(self) -> bytes | bytearray:
        delay = 0.001
        while True:
            if self._slice is not None:
                if data := await self._read(self._slice):
                    return data
                self._slice = None
                self._reading = self._pull()
            if not self._ready:
                self._ready.extend(await asyncio.wrap_future(self._reading))
            chunk = self._ready.popleft()
            if isinstance(chunk, OpenSlice):
                self._slice = chunk
            elif isinstance(chunk, Future):
                data = await asyncio.wrap_future(chunk)
                self._reading = self._pull()
                if data:
                    return data
            elif chunk is None:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _MAX_POLL_S)
                self._reading = self._pull()
            else:
                if chunk and not self._ready:
                    self._reading = self._pull()
                return chunk

    async def _read(self, part: OpenSlice) -> bytes | bytearray:
        data = part.read_cached()
        if data is None:
            reading = self._submit(part.read)
            self._reading = reading
            return await asyncio.wrap_future(reading)
        await asyncio.sleep(0)  # it is the turn of others
        return data

    def close(self) -> None:
        # A generator cannot be closed while a thread runs it.
        chunks = self._chunks
        self._reading.add_done_callback(lambda _: chunks.close())
        del self._reading  # an error in it refers to us, and so to all that was to be sent


def _pull(chunks: Generator[Chunk]) -> list[Chunk]:
    """The next chunks: several, where they are small, and there at once. After the last, an empty one."""
    pulled: list[Chunk] = []
    size = 0
    began = perf_counter()
    for chunk in chunks:
        data = chunk.read() if isinstance(chunk, OpenSlice) and len(chunk) < CHUNK_BYTES else chunk
        pulled.append(data)
        if not isinstance(data, bytes):
            return pulled
        size += len(data)
        if size >= CHUNK_BYTES or perf_counter() - began > _GATHER_S:
            return pulled
    return [*pulled, b""]


@dataclass(frozen=True, slots=True)
class Unread:
    """What HEAD wants to know of a body."""

    size: int | None

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        raise NotImplementedError  # HEAD asks for no more than the size


async def exhaust(body: Body, submit: Submit) -> None:
    """Wait until a body is made, and its size known."""
    chunks = _ReadAhead(body.read(sys.maxsize, None), submit)
    try:
        while await chunks.next():
            pass
    finally:
        chunks.close()


async def _pump(request: Request, response: HTTPResponse, chunks: _ReadAhead, size: int | None) -> None:
    """Send a body of that size, if it is known before."""
    sent = request.ctx.sent = 0
    try:
        chunk = await chunks.next()
        request.ctx.head_at = perf_counter()
        await request.respond(response)
        while chunk:
            if size is not None and sent + len(chunk) > size:
                raise StoreObjectError(f"there is more of it than {size} bytes")
            await response.send(cast("bytes", chunk))
            sent = request.ctx.sent = sent + len(chunk)
            chunk = await chunks.next()
        if size is not None and sent < size:
            raise StoreObjectError(f"only {sent} of {size} bytes are there")
    except Exception as error:
        if not request.responded:
            raise
        _log.error("%s breaks off after %d bytes: %s", request.path, sent, error)
        request.ctx.broken = True
        _abort(request)
    except BaseException:  # the client is gone, or too slow, or we are told to stop
        _abort(request)
        raise
    finally:
        chunks.close()


def _abort(request: Request) -> None:
    # Sanic would end the body politely, and the client take it for whole.
    if request.transport is not None:
        cast("asyncio.WriteTransport", request.transport).abort()
