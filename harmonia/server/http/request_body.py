"""Bodies of requests: small ones are read whole, and those of refused requests are dropped."""

from collections.abc import Callable
from functools import wraps

from sanic import Request
from sanic.exceptions import SanicException

from harmonia.errors import FormatError, RequestRefusedError
from harmonia.nix.content_coding import Decoder, decoder
from harmonia.server.http import sanic_adapter
from harmonia.server.http.response import Handler, Representation
from harmonia.untrusted import integer

STALL_S = 60.0
"""Seconds without a byte of the body, after which reading fails."""
_DROP_STALL_S = 5.0  # for the rest of a refused body
_MAX_DROPPED_BYTES = 1 << 20  # that a client may send before it reads the refusal
_MAX_BODY_BYTES = (1 << 63) - 1


def content_length(request: Request) -> int:
    """Return the length of the body in bytes. Raises SanicException 411 if the client does not send it."""
    size = integer(request.headers.get("content-length", "").strip(), _MAX_BODY_BYTES)
    if size is None:
        raise SanicException(status_code=411)
    return size


async def read_small(request: Request, most: int) -> bytes:
    """Return a body that fits into memory, decoded.

    Raises RequestRefusedError if it is longer than `most` bytes or malformed, TimeoutError if the client stops sending.
    """
    if content_length(request) > most:
        raise RequestRefusedError(413, f"the body has more than {most} bytes")
    body = b"".join([data async for data in sanic_adapter.body_of(request, STALL_S)])
    try:
        decoding = decoder_of(request)
        return decoding.decode(body, most) if decoding else body
    except FormatError as error:
        raise RequestRefusedError(400, f"cannot decode the body: {error}; send it without compression") from None


def decoder_of(request: Request) -> Decoder | None:
    """Return the decoder of the body, or None if it is not encoded. Raises FormatError if a coding is unknown."""
    codings = sanic_adapter.field_value(request, "content-encoding").split(",")
    return decoder(coding.strip() for coding in codings)


def dropping(handler: Handler, failed: Callable[[Request, Exception], Exception]) -> Handler:
    """Return a handler that drops the rest of the body after an error, and raises what `failed` makes of the error."""

    @wraps(handler)
    async def handle(context: object, request: Request, **parameters: str) -> Representation:
        try:
            return await handler(context, request, **parameters)
        except Exception as error:
            await sanic_adapter.drop_body(request, _MAX_DROPPED_BYTES, _DROP_STALL_S)
            raise failed(request, error) from error

    return handle
