"""How a representation becomes a response: conditions, encodings, ranges, HEAD, and the one pump for streamed bodies.

RFC 9110 sections 8.4, 12.5.3, 13 and 14. A body that fails half-way ends in a broken connection, never in a short one
that looks complete.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Protocol, cast

from sanic import HTTPResponse, Request
from sanic.exceptions import NotFound, RangeNotSatisfiable, SanicException

from harmonia.errors import StoreObjectError
from harmonia.process.thread_reader import Submit, read_bytes, read_in_threads
from harmonia.server.http import byte_range
from harmonia.server.http.negotiation import prefers_zstd
from harmonia.server.http.response_cache import StillValid
from harmonia.store.file_reader import END, Chunk, Step

IMMUTABLE = "public, max-age=31536000, immutable"
IMMUTABLE_NAR = f"{IMMUTABLE}, no-transform"
"""For what is compressed, or need not be: a proxy that compresses it takes its ranges away."""
UNNAMED = "no-store, no-transform"
"""For a URL that does not name its bytes: an HTTP cache could answer ranges of it from two files."""

_TAG = re.compile(r'(?:W/)?"[!#-~\x80-\xff]*"')
_PACKET_BYTES = 1400  # bytes; what is no longer than that takes no less time when it is compressed
_LENGTH_WAIT_S = 0.25  # for which a range waits for the length of what is still being made
_log = logging.getLogger("harmonia")


_Chunks = Generator[Step | None] | AsyncGenerator[bytes] | AsyncGenerator[Chunk]
"""A generator, which threads run (process/thread_reader.py), or one that the event loop runs."""
_Pieces = AsyncGenerator[bytes | bytearray]


class Body(Protocol):
    """Bytes that are read when they are wanted. Whoever opens a body closes it; `respond` closes what it is given."""

    @property
    def size(self) -> int | None:
        """How many they are, None as long as that is not known."""

    def read(self, start: int, stop: int | None) -> _Chunks:
        """The bytes from `start` to `stop`, or to the end, in chunks. From END, it ends when the size is known."""

    def close(self) -> None:
        """Give back all that it holds. Nobody reads it any longer."""


Open = Callable[[Request], Awaitable[Body]]


@dataclass(frozen=True, slots=True)
class Deferred:
    """A body that is opened when it is known to be wanted."""

    open: Open
    size_for_head: Callable[[Request], Awaitable[int | None]] | None = None
    """Returns its size for HEAD, if that takes less than to open it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body in the content coding zstd. `name` tells how it is encoded from every other way to do it."""

    name: str
    body: Deferred


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """What a resource has to say, whatever the method and the conditions of the request (RFC 9110 section 3.2).

    It owns its body.
    """

    content_type: str
    body: bytes | Body | Deferred
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


async def respond(request: Request, representation: Representation, submit: Submit) -> HTTPResponse | None:
    """The response to return to Sanic, or None where it has been sent already. In either case, the body is closed.

    An error is raised only before the first byte; after it, the connection is broken.
    """
    body = representation.body
    if isinstance(body, bytes | Deferred):
        return await _respond(request, representation, submit)
    with closing(body):
        return await _respond(request, representation, submit)


async def _respond(request: Request, representation: Representation, submit: Submit) -> HTTPResponse | None:
    headers = {"cache-control": representation.cache_control, "content-type": representation.content_type}
    headers |= representation.headers
    body, etag = representation.body, representation.etag
    if representation.zstd is not None:
        headers["vary"] = "Accept-Encoding"
        if _is_encoded(request, representation):
            headers["content-encoding"] = "zstd"
            body = representation.zstd.body
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
    if not isinstance(body, Deferred):
        return await _respond_with(request, body, headers, submit)
    if request.method == "HEAD" and body.size_for_head is not None:
        return _head(request, await body.size_for_head(request), headers)
    with closing(await body.open(request)) as opened:
        return await _respond_with(request, opened, headers, submit)


async def _respond_with(request: Request, body: Body, headers: dict[str, str], submit: Submit) -> HTTPResponse | None:
    if request.method == "HEAD":
        return _head(request, body.size, headers)
    wanted = _wanted(request, headers)
    begun = None
    if body.size is None and (wanted is not None or request.version == "1.0"):
        begun = await _reached(body, wanted, submit, needs_length=request.version == "1.0")
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
    pieces, first = begun or (_pieces(body, start, stop, submit), b"")
    response = HTTPResponse(status=status, headers=headers)
    await _send(request, response, pieces, first, None if stop is None else stop - start)
    return None


def _head(request: Request, size: int | None, headers: dict[str, str]) -> HTTPResponse:
    if size is not None:
        headers["content-length"] = str(size)
        return HTTPResponse(headers=headers)
    if request.version != "1.0":
        headers["transfer-encoding"] = "chunked"
    return _HeadOfUnknownLength(headers=headers)


async def _reached(
    body: Body, wanted: byte_range.Wanted | None, submit: Submit, *, needs_length: bool
) -> tuple[_Pieces, bytes | bytearray] | None:
    """Wait until a body of unknown length is made so far that it can be answered.

    That is to its end for a whole body, for the last bytes of one, and for an open range that needs a length. Any other
    range begins when its first byte is there, or its last byte if it names that. Return the pieces of an open range
    whose length is still unknown then, of which the first is taken already.
    """
    if wanted is not None and wanted.first is not None and not (wanted.is_open and needs_length):
        with suppress(TimeoutError):
            async with asyncio.timeout(_LENGTH_WAIT_S):
                await exhaust(body, submit)
        if body.size is not None:
            return None
        start = wanted.first if wanted.is_open else wanted.last or 0
        pieces = _pieces(body, start, None if wanted.is_open else start + 1, submit)
        first: bytes | bytearray = b""
        try:
            first = await anext(pieces, b"")
        finally:
            if not (first and wanted.is_open):
                await pieces.aclose()
        if first:
            return (pieces, first) if wanted.is_open else None
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
    size = len(plain) if isinstance(plain, bytes) else None if isinstance(plain, Deferred) else plain.size
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


async def exhaust(body: Body, submit: Submit) -> None:
    """Wait until a body is made, and its size known."""
    async with aclosing(_pieces(body, END, None, submit)) as nothing:
        async for _ in nothing:
            pass


def _pieces(body: Body, start: int, stop: int | None, submit: Submit) -> _Pieces:
    chunks = body.read(start, stop)
    return read_bytes(read_in_threads(chunks, submit) if isinstance(chunks, Generator) else chunks, submit)


async def _send(
    request: Request, response: HTTPResponse, pieces: _Pieces, first: bytes | bytearray, size: int | None
) -> None:
    """Send the first piece, if any was taken before, and the others, of that size in all if it is known."""
    sent = request.ctx.sent = 0
    async with aclosing(pieces):
        try:
            piece = first or await anext(pieces, b"")
            request.ctx.head_at = perf_counter()
            await request.respond(response)
            while piece:
                if size is not None and sent + len(piece) > size:
                    raise StoreObjectError(f"there is more of it than {size} bytes")
                await response.send(cast("bytes", piece))
                sent = request.ctx.sent = sent + len(piece)
                piece = await anext(pieces, b"")
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


def _abort(request: Request) -> None:
    # Sanic would end the body politely, and the client take it for whole.
    if request.transport is not None:
        cast("asyncio.WriteTransport", request.transport).abort()
