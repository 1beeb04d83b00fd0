"""An upstream's answer, whose content codings are taken off while it is read (RFC 9110 section 8.4).

Nobody asks for them, but caches of static files send what they have, as it is stored.
"""

import asyncio
from types import TracebackType
from typing import Self, cast

import aiohttp

from harmonia.errors import FormatError
from harmonia.nix.decompress import decoder
from harmonia.upstream.header_fields import Headers, elements
from harmonia.upstream.transport import AnswerError, Transport


class Answer:
    """To be closed. Raise AnswerError if the content codings are unknown."""

    def __init__(self, transport: Transport, response: aiohttp.ClientResponse) -> None:
        self._transport = transport
        self._response = response
        try:
            self._decoder = decoder(elements(response.headers, "Content-Encoding"))
        except FormatError as error:
            response.close()
            raise AnswerError(transport.base, str(error)) from None
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
        """Return the next bytes, none at the end: `most`, or what comes out of so many. Raise AnswerError."""
        if self._decoder is None:
            return await self._transport.read(self._response, most)
        while True:
            try:
                piece = await asyncio.to_thread(next, self._pieces, None)
            except FormatError as error:
                raise AnswerError(self._transport.base, f"its Content-Encoding is wrong: {error}") from None
            if piece:
                return piece
            if piece is None:
                data = await self._transport.read(self._response, most)
                if not data and not self._decoder.whole:
                    raise AnswerError(self._transport.base, "its encoded answer is cut short")
                if not data:
                    return b""
                self._pieces = self._decoder.feed(data)

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
