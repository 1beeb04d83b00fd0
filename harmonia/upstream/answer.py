"""An upstream's answer, whose content codings are taken off while it is read (RFC 9110 section 8.4).

Nobody asks for them, but caches of static files send what they have, as it is stored.
"""

from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self, cast

import aiohttp

from harmonia.errors import FormatError
from harmonia.nix.decompress import SizeError, decoder
from harmonia.upstream.header_fields import Headers, elements
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import Transport

_LONG_BYTES = 64 << 10
_MAX_EMPTY_PIECES = 1000  # in a thread at once: each stream of a file makes at least one piece


class Answer:
    """To be closed. Raise UpstreamMismatchError if the content codings are unknown."""

    def __init__(self, transport: Transport, response: aiohttp.ClientResponse, asked: str) -> None:
        """`asked` is the URL of the question."""
        self._transport = transport
        self._response = response
        self._asked = asked
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
        """The bytes that can be read, if that is told."""
        return None if self.is_encoded else self._response.content_length

    async def read(self, most: int) -> bytes:
        """Return the next bytes, none at the end: `most`, or what comes out of so many.

        Raise UpstreamUnavailableError if they do not come, UpstreamMismatchError if their content codings are wrong.
        """
        if self._decoder is None:
            return await self._transport.read(self._response, most)
        while True:
            try:
                piece = await self._transport.in_thread(_next_piece, self._pieces)
            except FormatError as error:
                raise self._refuse(Reason.ENCODING, f"its Content-Encoding is wrong: {error}") from None
            if piece:
                return piece
            if piece is None:
                data = await self._transport.read(self._response, most)
                if not data and not self._decoder.whole:
                    raise self._refuse(Reason.ENCODING, "its encoded answer is cut short")
                if not data:
                    return b""
                self._pieces = self._decoder.feed(data)

    async def read_whole(self, most: int, before_long: Callable[[], Awaitable[object]]) -> bytes:
        """Return all bytes of a small answer. Raise UpstreamMismatchError if `most` are exceeded, sent or decoded.

        `before_long` is awaited before the answer takes much memory.
        """
        body = bytearray()
        is_long = False
        while data := await self._transport.read(self._response, _LONG_BYTES):
            body += data
            if len(body) > most:
                raise self._refuse(Reason.TOO_LONG, f"it is longer than {most} bytes")
            if not is_long and len(body) >= _LONG_BYTES:
                is_long = True
                await before_long()
        if self._decoder is None:
            return bytes(body)
        if not is_long:
            await before_long()
        try:
            return await self._transport.in_thread(self._decoder.decode, bytes(body), most)
        except SizeError as error:
            raise self._refuse(Reason.TOO_LONG, f"without its Content-Encoding, {error}") from None
        except FormatError as error:
            raise self._refuse(Reason.ENCODING, f"its Content-Encoding is wrong: {error}") from None

    def _refuse(self, reason: Reason, why: str) -> UpstreamMismatchError:
        return self._transport.refusals.refuse(self._asked, reason, why)

    def close(self) -> None:
        self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # One that was read to its end gives its connection back.
        if kind is None:
            self._response.release()
        else:
            self._response.close()


def _next_piece(pieces: Iterator[bytes]) -> bytes | None:
    """Return the next piece that is not empty, an empty one if there are many of those, or None at the end."""
    piece = None
    for piece in islice(pieces, _MAX_EMPTY_PIECES):
        if piece:
            break
    return piece
