"""Responses from representations: conditional requests, content codings, ranges, HEAD, and streaming of bodies.

RFC 9110 sections 8.4, 12.5.3, 13 and 14. If a body fails after its first byte, the connection is aborted: a client
never takes a truncated body for complete.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Protocol, Self, cast

from sanic import HTTPResponse, Request
from sanic.exceptions import NotFound, RangeNotSatisfiable, SanicException, ServiceUnavailable

from harmonia.errors import StoreObjectError
from harmonia.process.request_trace import log
from harmonia.process.thread_reader import Submit, read_bytes, read_in_threads
from harmonia.server.http import byte_range
from harmonia.server.http.negotiation import prefers_zstd
from harmonia.server.http.response_cache import StillValid
from harmonia.server.http.sanic_adapter import field_value
from harmonia.server.http.small_uploads import Store
from harmonia.store.file_reader import END, Chunk, Step

IMMUTABLE = "public, max-age=31536000, immutable"
IMMUTABLE_NAR = f"{IMMUTABLE}, no-transform"
"""For NARs: a proxy that compresses them removes byte ranges."""
UNNAMED = "no-store, no-transform"
"""For a URL that does not determine the bytes: an HTTP cache could combine ranges of two files."""

_PLAIN_RANGE = re.compile(r"bytes=[0-9]{0,15}-[0-9]{0,15}")
_TAG = re.compile(r'(?:W/)?"[!#-~\x80-\xff]*"')
PACKET_BYTES = 1400
"""Size up to which a body is not compressed: it fits into one packet."""
_LENGTH_WAIT_S = 0.25  # for which a range waits for the length of a body that is still being generated
_HTTP_1_0_WAIT_S = 50.0
"""Seconds for which a response to HTTP/1.0 waits for the length of its body, which grows in the cache meanwhile.

After 60 s, nginx would answer 504, and send no requests to this server for 10 s.
"""
_log = logging.getLogger("harmonia")


_Chunks = Generator[Step | None] | AsyncGenerator[bytes] | AsyncGenerator[Chunk]
"""A generator that threads run (process/thread_reader.py), or an async generator for the event loop."""
_Pieces = AsyncGenerator[bytes | bytearray]


class Body(Protocol):
    """Bytes that are read on demand. The code that opens a body must close it; `respond` closes its argument."""

    @property
    def size(self) -> int | None:
        """Number of bytes, or None while it is unknown."""

    def read(self, start: int, stop: int | None) -> _Chunks:
        """Yield the bytes from `start` to `stop`, or to the end, in chunks.

        If `start` is END, yield nothing, and end when the size is known.
        """

    def close(self) -> None:
        """Release files, connections and locks. Call it after the last read."""


Open = Callable[[Request], Awaitable[Body | bytes]]


@dataclass(frozen=True, slots=True)
class Deferred:
    """A body that is opened only when it is sent."""

    open: Open
    size_for_head: Callable[[Request], Awaitable[int | None]] | None = None
    """Returns the size for HEAD, if that is cheaper than opening the body."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body with the content coding zstd. `name` identifies the encoder and its parameters, for the ETag."""

    name: str
    body: Deferred


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """A representation of a resource (RFC 9110 section 3.2), before method and conditions apply. It owns its body."""

    content_type: str
    body: bytes | Body | Deferred
    cache_control: str
    etag: str | None = None
    zstd: Encoded | None = None
    """The encoded body, for clients that accept zstd. Its ETag differs."""
    worthwhile: bool = True
    """True to send zstd even to clients that also accept identity."""
    status: HTTPStatus = HTTPStatus.OK
    """The status. Only a body in memory may have another one than 200."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers. Names are in lower case."""
    resumable: bool = True
    """True if the URL determines the bytes. Otherwise, a range gets 404, unless If-Range has the ETag."""
    still_valid: StillValid | None = None
    """True while this response may be replayed to an identical request. Allowed only for in-memory bodies; must be
    cheap, and must not widen access.
    """
    store: Store | None = None
    """Stores the body of a similar upload, whose head differs only in name and length (see `small_uploads`)."""

    @classmethod
    def of_metadata(cls, content_type: str, text: bytes, max_age: int) -> Self:
        """Return a representation that caches may keep for `max_age` seconds."""
        return cls(content_type=content_type, body=text, cache_control=f"public, max-age={max_age}", etag=etag_of(text))


def etag_of(text: bytes) -> str:
    """Return an ETag that is a hash of the text."""
    return f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"'


Handler = Callable[..., Awaitable[Representation]]
"""Handles requests for a resource. Arguments: the context, the request, and the parameters of the URI."""


async def respond(request: Request, representation: Representation, submit: Submit) -> HTTPResponse | None:
    """Return the response for Sanic to send, or None if it was streamed already. Close the body in both cases.

    Raises errors only before the first byte is sent. Later errors are logged, and abort the connection.
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
        is_encoded = _is_encoded(request, representation)
        log.debug("content coding %s, for Accept-Encoding", "zstd" if is_encoded else "identity")
        if is_encoded:
            headers["content-encoding"] = "zstd"
            body = representation.zstd.body
            etag = etag and f'{etag[:-1]}-encoded-{representation.zstd.name}"'
    if etag is not None:
        headers["etag"] = etag
    if representation.status == HTTPStatus.OK and _is_unmodified(request, etag):
        log.debug("the client has this version: %s", etag)
        without_content = {name: value for name, value in headers.items() if not name.startswith("content-")}
        return HTTPResponse(status=HTTPStatus.NOT_MODIFIED, headers=without_content)
    if not isinstance(body, bytes) and "content-encoding" not in headers:
        headers["accept-ranges"] = "bytes" if representation.resumable else "none"
        if not representation.resumable and wants_part(request) and "if-range" not in request.headers:
            raise NotFound
    if isinstance(body, Deferred):
        if request.method == "HEAD" and body.size_for_head is not None:
            return _head(request, await body.size_for_head(request), headers)
        body = await body.open(request)
    if isinstance(body, bytes):
        headers["content-length"] = str(len(body))
        return HTTPResponse(None if request.method == "HEAD" else body, representation.status, headers)
    with closing(body):
        return await _respond_with(request, body, headers, submit)


async def _respond_with(request: Request, body: Body, headers: dict[str, str], submit: Submit) -> HTTPResponse | None:
    if request.method == "HEAD":
        return _head(request, body.size, headers)
    if (response := _response_for_nginx(request, body, headers)) is not None:
        return response
    part = _requested_range(request, headers)
    begun = None
    if body.size is None and (part is not None or request.version == "1.0"):
        try:
            async with asyncio.timeout(_HTTP_1_0_WAIT_S if request.version == "1.0" else None):
                begun = await _reached(body, part, submit, needs_length=request.version == "1.0")
        except TimeoutError:
            raise ServiceUnavailable("the length of the body is not known yet; the client may retry") from None
    status = HTTPStatus.OK
    start, stop = 0, body.size
    if part is not None:
        log.debug("a range: %s", part)
        status = HTTPStatus.PARTIAL_CONTENT
        start, stop = _bounds(part, body.size)
        last = part.last or byte_range.UNKNOWN_LAST if stop is None else stop - 1
        headers["content-range"] = f"bytes {start}-{last}/{'*' if body.size is None else body.size}"
        if stop is None:
            headers["cache-control"] = UNNAMED  # otherwise, an HTTP cache could store a truncated range as complete
    if stop is not None:
        headers["content-length"] = str(stop - start)
    turn = partial(request.app.ctx.loop_turns.start, partial(request.app.ctx.client, request))
    pieces, first = begun or (_pieces(body, start, stop, submit, turn), b"")
    response = HTTPResponse(status=status, headers=headers)
    await _send(request, response, pieces, first, None if stop is None else stop - start)
    return None


def _response_for_nginx(request: Request, body: Body, headers: dict[str, str]) -> HTTPResponse | None:
    """Return a response that makes nginx send the body from its file, or None if this server has to send it.

    nginx selects the range. It cannot answer conditional requests, because it does not know the ETag, and reads some
    values of Range in another way. Cache-Control has another name, because nginx would keep it if the file is missing
    and this server then answers once more.
    """
    name: str | None = getattr(body, "cached_name", None)
    if name is None or body.size is None or "content-encoding" in headers:
        return None
    location: str | None = request.app.ctx.nginx_location(request)
    if location is None or any(field.startswith("if-") for field in request.headers):
        return None
    if "range" in request.headers and not (
        wants_part(request) and _PLAIN_RANGE.fullmatch(field_value(request, "range"))
    ):
        return None
    part = _requested_range(request, headers)
    start, stop = (0, body.size) if part is None else _bounds(part, body.size)
    request.ctx.sent = (stop or 0) - start
    status = HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT
    fields = {field: headers[field] for field in ("content-type", "etag") if field in headers}
    fields |= {"x-accel-redirect": location + name, "x-cache-control": headers["cache-control"]}
    return HTTPResponse(status=status, headers=fields)


def _head(request: Request, size: int | None, headers: dict[str, str]) -> HTTPResponse:
    if size is not None:
        headers["content-length"] = str(size)
        return HTTPResponse(headers=headers)
    if request.version != "1.0":
        headers["transfer-encoding"] = "chunked"
    return _HeadOfUnknownLength(headers=headers)


async def _reached(
    body: Body, part: byte_range.ByteRange | None, submit: Submit, *, needs_length: bool
) -> tuple[_Pieces, bytes | bytearray] | None:
    """Wait until enough of a body of unknown length is generated for the head of the response.

    A whole body, a range of the last bytes, and an open range that needs a length wait for the end of the body. An open
    range waits for its first byte, a closed range for its last byte. Return the pieces of an open range whose length is
    still unknown, with the first piece, which is already read. Otherwise, return None.
    """
    if part is not None and part.first is not None and not (part.is_open and needs_length):
        with suppress(TimeoutError):
            async with asyncio.timeout(_LENGTH_WAIT_S):
                await generate_to_end(body, submit)
        if body.size is not None:
            return None
        start = part.first if part.is_open else part.last or 0
        pieces = _pieces(body, start, None if part.is_open else start + 1, submit)
        first: bytes | bytearray = b""
        try:
            first = await anext(pieces, b"")
        finally:
            if not (first and part.is_open):
                await pieces.aclose()
        if first:
            return (pieces, first) if part.is_open else None
    if body.size is None:
        await generate_to_end(body, submit)
    return None


def _bounds(part: byte_range.ByteRange, size: int | None) -> tuple[int, int | None]:
    """Return start and stop of a range. The stop is None for an open range of a body of unknown size.

    Raises RangeNotSatisfiable if the range lies beyond the end.
    """
    if size is None:
        return part.first or 0, None if part.is_open else (part.last or 0) + 1
    try:
        return byte_range.bounds(part, size)
    except byte_range.UnsatisfiableError:
        raise RangeNotSatisfiable(headers={"content-range": f"bytes */{size}"}) from None


class _HeadOfUnknownLength(HTTPResponse):
    @property
    def processed_headers(self) -> Iterator[tuple[bytes, bytes]]:
        self.headers.pop("content-length")  # Sanic has set it to 0
        return super().processed_headers


def _is_encoded(request: Request, representation: Representation) -> bool:
    """Return True if the response should have the zstd coding.

    Never for ranges, because Nix counts the plain bytes of a range. Never for HTTP/1.0, which needs a length.
    """
    plain = representation.body
    size = len(plain) if isinstance(plain, bytes) else None if isinstance(plain, Deferred) else plain.size
    worthwhile = representation.worthwhile and (size is None or size > PACKET_BYTES)
    sendable = not wants_part(request) and request.version != "1.0"
    return prefers_zstd(field_value(request, "accept-encoding"), worthwhile=worthwhile and sendable)


def wants_part(request: Request) -> bool:
    """Return True if the request has a valid Range, which only counts for GET (RFC 9110 section 14.2)."""
    return request.method == "GET" and byte_range.is_single(field_value(request, "range"))


def _requested_range(request: Request, headers: Mapping[str, str]) -> byte_range.ByteRange | None:
    """Return the range to send, or None for the whole body."""
    if request.method != "GET" or "content-encoding" in headers:
        return None
    return byte_range.requested(field_value(request, "range"), request.headers.get("if-range"), headers.get("etag"))


def _is_unmodified(request: Request, etag: str | None) -> bool:
    """Return True if If-None-Match has the ETag. Raises 412 if If-Match does not (RFC 9110 section 13.2.2).

    Conditions on dates are ignored, because no resource has Last-Modified (sections 13.1.3 and 13.1.4).
    """
    if "if-match" in request.headers and not _names(field_value(request, "if-match"), etag, weakly=False):
        raise SanicException(status_code=HTTPStatus.PRECONDITION_FAILED)
    return "if-none-match" in request.headers and _names(field_value(request, "if-none-match"), etag, weakly=True)


def _names(condition: str, etag: str | None, *, weakly: bool) -> bool:
    """Return True if a condition has this ETag. `*` matches any ETag, and also none."""
    tags = _TAG.findall(condition)
    return condition.strip(" \t") == "*" or etag in tags or (weakly and f"W/{etag}" in tags)


async def generate_to_end(body: Body, submit: Submit) -> None:
    """Generate a body to its end without sending it, so that its size becomes known."""
    async with aclosing(_pieces(body, END, None, submit)) as nothing:
        async for _ in nothing:
            pass


def _pieces(
    body: Body, start: int, stop: int | None, submit: Submit, turn: Callable[[], Awaitable[None]] | None = None
) -> _Pieces:
    """Return the bytes of a body. `turn` waits until the event loop may read, if the reads of the body are short."""
    chunks = body.read(start, stop)
    if isinstance(chunks, Generator):
        chunks = read_in_threads(chunks, submit, turn if getattr(body, "reads_briefly", False) else None)
    return read_bytes(chunks, submit)


async def _send(
    request: Request, response: HTTPResponse, pieces: _Pieces, first: bytes | bytearray, size: int | None
) -> None:
    """Stream a body: its `first` piece, if one was read already, and then `pieces`. `size` is the total, if known.

    If the body has another size or fails after the first byte, log that and abort the connection.
    """
    sent = request.ctx.sent = 0
    async with aclosing(pieces):
        try:
            piece = first or await anext(pieces, b"")
            request.ctx.head_at = perf_counter()
            await request.respond(response)
            while piece:
                if size is not None and sent + len(piece) > size:
                    raise StoreObjectError(f"the body is longer than {size} bytes")
                if sent:
                    await request.app.ctx.loop_turns.send(id(request), partial(request.app.ctx.client, request))
                await response.send(cast("bytes", piece))
                sent = request.ctx.sent = sent + len(piece)
                piece = await anext(pieces, b"")
            if size is not None and sent < size:
                raise StoreObjectError(f"the body has only {sent} of {size} bytes")
        except Exception as error:
            if not request.responded:
                raise
            _log.error("%s breaks off after %d bytes: %s", request.path, sent, error)
            request.ctx.broken = True
            _abort(request)
        except BaseException:  # the client has disconnected or is too slow, or the worker stops
            _abort(request)
            raise


def _abort(request: Request) -> None:
    # Otherwise, Sanic would end the body regularly, and the client would take it for complete.
    if request.transport is not None:
        cast("asyncio.WriteTransport", request.transport).abort()
