"""Response of an upstream, whose content codings are decoded while it is read (RFC 9110 section 8.4).

Our requests accept identity only, but caches of static files send their files with the coding that is stored.
"""

from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self, cast

import aiohttp

from harmonia.errors import FormatError
from harmonia.nix.content_coding import SizeError, decoder
from harmonia.upstream.header_fields import Headers, elements
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import Transport

_LONG_BYTES = 64 << 10
_MAX_EMPTY_PIECES = 1000  # per call in a thread: each compressed stream of a file makes at least one piece


class Answer:
    """A response, whose owner must close it: use it as a context manager, or call `close`."""

    def __init__(self, transport: Transport, response: aiohttp.ClientResponse, url: str) -> None:
        """Take over a response to the request for the URL `url`.

        Raises UpstreamMismatchError if its content codings are unknown; then the response is closed.
        """
        self._transport = transport
        self._response = response
        self._url = url
        try:
            self._decoder = decoder(elements(response.headers, "Content-Encoding"))
        except FormatError as error:
            response.close()
            raise self._refuse(Reason.ENCODING, str(error)) from None
        self._pieces = iter(cast("list[bytes]", []))
        self.is_encoded = self._decoder is not None

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Headers:
        return self._response.headers

    @property
    def content_length(self) -> int | None:
        """Number of bytes that can be read, or None if the upstream does not send it."""
        return None if self.is_encoded else self._response.content_length

    async def read(self, most: int) -> bytes:
        """Return the next bytes: `most` bytes at most, or what these decode to. Empty at the end.

        Raises UpstreamUnavailableError if the transfer fails, UpstreamMismatchError if the content coding is invalid.
        """
        if self._decoder is None:
            return await self._transport.read_response(self._response, most)
        while True:
            try:
                piece = await self._transport.in_thread(_next_piece, self._pieces)
            except FormatError as error:
                raise self._refuse(Reason.ENCODING, f"invalid Content-Encoding: {error}") from None
            if piece:
                return piece
            if piece is None:
                data = await self._transport.read_response(self._response, most)
                if not data and not self._decoder.whole:
                    raise self._refuse(Reason.ENCODING, "the encoded response is truncated")
                if not data:
                    return b""
                self._pieces = self._decoder.feed(data)

    async def read_whole(self, most: int, reserve_memory: Callable[[], Awaitable[object]]) -> bytes:
        """Return all bytes of a small response.

        `reserve_memory` is awaited at most once: before the body exceeds 64 KiB, or before it is decoded. Raises
        UpstreamMismatchError if the bytes sent, or the decoded bytes, are more than `most`, or if the content coding is
        invalid; UpstreamUnavailableError if the transfer fails.
        """
        body = bytearray()
        is_long = False
        while data := await self._transport.read_response(self._response, _LONG_BYTES):
            body += data
            if len(body) > most:
                raise self._refuse(Reason.TOO_LONG, f"longer than {most} bytes")
            if not is_long and len(body) >= _LONG_BYTES:
                is_long = True
                await reserve_memory()
        if self._decoder is None:
            return bytes(body)
        if not is_long:
            await reserve_memory()
        try:
            return await self._transport.in_thread(self._decoder.decode, bytes(body), most)
        except SizeError as error:
            raise self._refuse(Reason.TOO_LONG, f"after decoding its Content-Encoding: {error}") from None
        except FormatError as error:
            raise self._refuse(Reason.ENCODING, f"invalid Content-Encoding: {error}") from None

    def _refuse(self, reason: Reason, why: str) -> UpstreamMismatchError:
        return self._transport.refusals.refuse(self._url, reason, why)

    def close(self) -> None:
        self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A response that was read to its end returns its connection to the pool.
        if kind is None:
            self._response.release()
        else:
            self._response.close()


def _next_piece(pieces: Iterator[bytes]) -> bytes | None:
    """Return the next nonempty piece, an empty one after 1000 empty ones, or None at the end."""
    piece = None
    for piece in islice(pieces, _MAX_EMPTY_PIECES):
        if piece:
            break
    return piece
