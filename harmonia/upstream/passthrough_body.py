"""What an upstream sends, passed on as it comes, no faster than it is taken, and not kept."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, closing
from functools import partial
from http import HTTPStatus
from typing import Protocol

from harmonia.store.file_reader import END
from harmonia.upstream.answer import Answer
from harmonia.upstream.client import Client
from harmonia.upstream.transport import WHOLE, Part

_PIECE_BYTES = 256 * 1024  # bytes that are taken at once


class Check(Protocol):
    """Looks at a whole body as it comes, and raises UpstreamError if it is wrong."""

    async def update(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...
    def close(self) -> None: ...


class PassthroughBody:
    """A body that the upstream has, to be closed. If it can be checked, its end is held back until it is right."""

    def __init__(
        self,
        client: Client,
        ask: Callable[[Part], Awaitable[Answer]],
        response: Answer | None = None,
        check: Callable[[], Check] | None = None,
        size: int | None = None,
        ask_whole: Callable[[], Awaitable[Answer]] | None = None,
    ) -> None:
        """`ask` gives an answer with the bytes from one position to another, or with all. `response` is one with all,
        where that has been asked for already. `check` makes what looks at the whole as it comes. `size` is how large it
        has to be, where that is told before. `ask_whole` is used in place of `ask` for a whole that is checked: it may
        follow redirects to other hosts.
        """
        self.size = response.content_length if size is None and response is not None else size
        self._client = client
        self._ask = ask
        self._ask_whole = ask_whole or partial(ask, WHOLE)
        self._response = response
        self._check = check

    def read(self, start: int, stop: int | None) -> AsyncGenerator[bytes]:
        pieces = self._pieces(start, stop)
        is_whole = start == 0 and stop in {None, self.size}
        return _checked(pieces, self._check()) if self._check is not None and is_whole else pieces

    def close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    async def _pieces(self, start: int, stop: int | None) -> AsyncGenerator[bytes]:
        part = WHOLE if start == END or (start, stop) == (0, self.size) else (start, stop)
        response, self._response = self._response, None
        if response is not None and part != WHOLE:
            response.close()
            response = None
        if response is None:
            response = await (self._ask_whole() if part == WHOLE else self._ask(part))
        if response.is_encoded and response.status == HTTPStatus.PARTIAL_CONTENT:  # a part of its encoded bytes
            response.close()
            response = await self._ask(WHOLE)  # not from anywhere, because a part of it cannot be checked
        async with response:
            position = start if response.status == HTTPStatus.PARTIAL_CONTENT else 0
            while stop is None or position < stop:
                data = await self._client.read_answer(response, _PIECE_BYTES)
                if not data:
                    self.size = position
                    break
                piece = data[max(start - position, 0) : None if stop is None else stop - position]
                position += len(data)
                if piece:
                    yield piece


async def _checked(pieces: AsyncGenerator[bytes], check: Check) -> AsyncGenerator[bytes]:
    held = b""
    with closing(check):
        async with aclosing(pieces):
            async for piece in pieces:
                await check.update(piece)
                if held:
                    yield held
                held = piece
        await check.finish()
    if held:
        yield held
