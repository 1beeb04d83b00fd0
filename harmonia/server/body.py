"""How a representation becomes a response: conditions, HEAD, and the one pump that every streamed body goes through.

Conditions are RFC 9110 section 13. A body that fails half-way ends in a broken connection, never in a short one that
looks complete.
"""

import asyncio
import logging
from collections.abc import Generator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol, cast

from sanic import HTTPResponse, Request
from sanic.exceptions import RangeNotSatisfiable

from harmonia.errors import StoreObjectError
from harmonia.server import byte_range

IMMUTABLE = "public, max-age=31536000, immutable"

_log = logging.getLogger("harmonia")


class Body(Protocol):
    """Bytes of a known number that are read when they are wanted, by a thread."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Generator[bytes]:
        """The bytes from `start` to `stop`, in chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """What a resource has to say, whatever the method and the conditions of the request (RFC 9110 section 3.2)."""

    content_type: str
    body: bytes | Body
    cache_control: str
    etag: str | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


async def respond(request: Request, representation: Representation, readers: Executor) -> HTTPResponse | None:
    """The response to return to Sanic, or None where it has been streamed already.

    FileNotFoundError and StoreObjectError come only from before the first byte.
    """
    headers = {"cache-control": representation.cache_control, **representation.headers}
    if representation.etag is not None:
        headers["etag"] = representation.etag
        if _matches(request.headers.get("if-none-match"), representation.etag):
            return HTTPResponse(status=304, headers=headers)
    headers["content-type"] = representation.content_type
    body, status = representation.body, representation.status
    start, stop = 0, len(body)
    if not isinstance(body, bytes):
        headers["accept-ranges"] = "bytes"
        if part := _range(request, representation):
            start, stop = part
            status = HTTPStatus.PARTIAL_CONTENT
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(body)}"
    headers["content-length"] = str(stop - start)
    if request.method == "HEAD":
        return HTTPResponse(status=status, headers=headers)
    if isinstance(body, bytes):
        return HTTPResponse(body, status=status, headers=headers)
    response = HTTPResponse(status=status, headers=headers)
    await _pump(request, response, body.read(start, stop), stop - start, readers)
    return None


def _range(request: Request, representation: Representation) -> tuple[int, int] | None:
    size = len(representation.body)
    try:
        header, if_range = request.headers.get("range"), request.headers.get("if-range")
        return byte_range.requested(header, if_range, representation.etag, size)
    except byte_range.UnsatisfiableError:
        raise RangeNotSatisfiable(headers={"content-range": f"bytes */{size}"}) from None


def _matches(condition: str | None, etag: str) -> bool:
    """Whether If-None-Match names this ETag, by the weak comparison that it asks for."""
    if condition is None:
        return False
    return condition.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in condition.split(","))


async def _pump(
    request: Request, response: HTTPResponse, chunks: Generator[bytes], size: int, readers: Executor
) -> None:
    """Send `size` bytes while a thread reads the next of them: at most three chunks are in memory."""
    reading = readers.submit(next, chunks, b"")
    left = size
    request.ctx.sent = 0
    try:
        chunk = await asyncio.wrap_future(reading)
        await request.respond(response)
        while chunk:
            left -= len(chunk)
            if left < 0:
                raise StoreObjectError("there is more of it than the database says")
            reading = readers.submit(next, chunks, b"")
            await response.send(chunk)
            request.ctx.sent += len(chunk)
            chunk = await asyncio.wrap_future(reading)
        if left:
            raise StoreObjectError(f"{left} bytes are missing of what the database says")
    except Exception as error:
        if not request.responded:
            raise
        _log.error("%s breaks off after %d of %d bytes: %s", request.path, size - left, size, error)
        _abort(request)
    except BaseException:  # the client is gone, or too slow, or we are told to stop
        _abort(request)
        raise
    finally:
        # A generator cannot be closed while a thread runs it.
        reading.add_done_callback(lambda _: chunks.close())


def _abort(request: Request) -> None:
    # Sanic would end the body politely, and the client take it for whole.
    if request.transport is not None:
        cast("asyncio.WriteTransport", request.transport).abort()
