"""How a representation becomes a response: conditions, HEAD, and the one pump that every streamed body goes through.

Conditions are RFC 9110 section 13. A body that fails half-way ends in a broken connection, never in a short one that
looks complete.
"""

import asyncio
import logging
from collections.abc import Generator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol, cast

from sanic import HTTPResponse, Request

from harmonia.errors import StoreObjectError

IMMUTABLE = "public, max-age=31536000, immutable"

_log = logging.getLogger("harmonia")


class Body(Protocol):
    """Bytes of a known number that are read when they are wanted, by a thread."""

    def __len__(self) -> int: ...

    def read(self) -> Generator[bytes]:
        """The bytes in chunks. FileNotFoundError before the first one where there is nothing to read any more."""


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
    body = representation.body
    if request.method == "HEAD":
        return HTTPResponse(status=representation.status, headers=headers | {"content-length": str(len(body))})
    if isinstance(body, bytes):
        return HTTPResponse(body, status=representation.status, headers=headers)
    headers["content-length"] = str(len(body))
    await _pump(request, HTTPResponse(status=representation.status, headers=headers), body, readers)
    return None


def _matches(condition: str | None, etag: str) -> bool:
    """Whether If-None-Match names this ETag, by the weak comparison that it asks for."""
    if condition is None:
        return False
    return condition.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in condition.split(","))


async def _pump(request: Request, response: HTTPResponse, body: Body, readers: Executor) -> None:
    """Send a body while a thread reads the next chunk of it: at most three chunks are in memory, one of them unsent."""
    chunks = body.read()
    reading = readers.submit(next, chunks, b"")
    left = len(body)
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
        _log.error("%s breaks off after %d of %d bytes: %s", request.path, len(body) - left, len(body), error)
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
