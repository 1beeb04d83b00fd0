"""Bodies of upstreams: from a file of the cache, complete or growing, or passed through at the client's speed."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, closing
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import Protocol

from harmonia.cache.growing_file import CachedFile
from harmonia.cache.zstd_stored import BLOCK_BYTES, StoredWriter, stored_size
from harmonia.errors import StoreObjectError
from harmonia.nix.decompress import decompressor
from harmonia.process.thread_reader import Submit, read_bytes, read_in_threads
from harmonia.process.threads import Threads
from harmonia.store.file_reader import END, Chunk, OpenSlice
from harmonia.upstream.answer import Answer
from harmonia.upstream.client import Client
from harmonia.upstream.transfer import Transfer
from harmonia.upstream.transport import WHOLE, Part

_PIECE_BYTES = 256 * 1024  # per read


class Check(Protocol):
    """Verifies a complete body while it arrives. Raises UpstreamError if it is invalid."""

    async def update(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...
    def close(self) -> None: ...


class PassthroughBody:
    """A body from an upstream. With a check, its last piece is held back until the whole body is verified."""

    def __init__(
        self,
        client: Client,
        ask: Callable[[Part], Awaitable[Answer]],
        response: Answer | None = None,
        check: Callable[[], Check] | None = None,
        size: int | None = None,
        ask_whole: Callable[[], Awaitable[Answer]] | None = None,
    ) -> None:
        """Create the body. The caller must close it.

        `ask` requests a range, or the whole body. `response` is a response with the whole body, if one was requested
        already. `check` creates the verifier of the whole body. `size` is the expected size, if it is known.
        `ask_whole` replaces `ask` for a whole body that is verified: it may follow redirects to other hosts.
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
        if response.is_encoded and response.status == HTTPStatus.PARTIAL_CONTENT:  # a range of encoded bytes is useless
            response.close()
            response = await self._ask(WHOLE)  # no redirects to other hosts, because a range cannot be verified
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


class CachedBody:
    """A NAR in the cache, complete or growing. If it stops growing, the rest is passed through from the upstream."""

    def __init__(
        self,
        file: CachedFile,
        submit: Submit,
        size: int | None = None,
        transfer: Transfer | None = None,
        rest: PassthroughBody | None = None,
    ) -> None:
        """Take over an open file. `submit` runs its reader in a thread. `rest` may be None if the file is complete."""
        self.size = file.size if file.whole else size
        self._file: CachedFile | None = file
        """None after the file stopped growing. A second read (response.py reads first for the size) uses `rest`."""
        self._submit = submit
        self._position = 0
        """Position up to which the file was read."""
        self._transfer = transfer
        self._rest = rest
        if rest is not None and rest.size is None:
            rest.size = self.size  # so that it recognizes a request for the whole NAR, and verifies it

    @property
    def is_complete(self) -> bool:
        """Return True if the cache has the complete file."""
        return self._file is not None and self._file.whole

    @property
    def cached_name(self) -> str | None:
        """The name of the file in the cache that other programs may send in place of this body, or None."""
        return None if self._file is None else self._file.sendable_name

    def close(self) -> None:
        self._close_file()
        if self._rest is not None:
            self._rest.close()

    async def read(self, start: int, stop: int | None) -> AsyncGenerator[Chunk]:
        self._position = start
        async with aclosing(self._read_file(start, stop)) as chunks:
            async for chunk in chunks:
                yield chunk
        if self._file is None and self._rest is not None:
            async with aclosing(self._rest.read(self._position, stop)) as pieces:
                async for piece in pieces:
                    yield piece
            self.size = self._rest.size

    async def _read_file(self, start: int, stop: int | None) -> AsyncGenerator[Chunk]:
        """Yield the content of the file. If the file stops growing too early, close it.

        Raises the error of the transfer, or StoreObjectError if the content was withdrawn because it was wrong.
        """
        file = self._file
        if file is None:
            return
        async with aclosing(read_in_threads(self._follow(file, start, stop), self._submit)) as chunks:
            async for chunk in chunks:
                yield chunk
        if file.whole:
            self.size = file.size
        if file.whole or self._position == stop:
            return
        withdrawn = start < self._position and file.size < self._position
        self._close_file()  # readers in other workers wait for its lock
        if self._transfer is not None and self._transfer.error is not None:
            raise self._transfer.error
        if withdrawn:
            raise StoreObjectError("the NAR from the upstream is invalid")

    def _follow(self, file: CachedFile, start: int, stop: int | None) -> Generator[OpenSlice | None]:
        self._position = yield from file.follow(start, stop)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


class StoredBody:
    """A NAR of an upstream as a zstd file without compression, whose length follows from NarSize. It has no ranges.

    For HTTP/1.0, which needs a length, if the upstream sends a zstd file without one.
    """

    def __init__(self, file: CachedBody | PassthroughBody, nar_size: int, submit: Submit, threads: Threads) -> None:
        """Take over the body of the zstd file, which is verified while it is read."""
        self.size = stored_size(nar_size)
        self._file = file
        self._nar_size = nar_size
        self._submit = submit
        self._threads = threads

    def close(self) -> None:
        self._file.close()

    async def read(self, start: int, stop: int | None) -> AsyncGenerator[bytes]:
        if start or stop not in {None, self.size}:
            raise NotImplementedError  # never asked for: without an ETag and not resumable
        writer, unpacker = StoredWriter(self._nar_size), decompressor("zstd")
        head = writer.head  # sent with the first block, so that an error before that has a status
        async with aclosing(read_bytes(self._file.read(0, None), self._submit)) as pieces:
            async for piece in pieces:
                blocks = (block for data in unpacker.feed(bytes(piece)) for block in writer.blocks(data))
                while joined := await self._threads.unpack(_join, blocks):
                    yield head + joined
                    head = b""
        if not unpacker.whole:
            raise StoreObjectError("the NAR from the upstream is truncated")
        yield head + writer.end()


def _join(blocks: Iterator[bytes]) -> bytes:
    """Return the next blocks, joined to a piece; empty at the end."""
    return b"".join(islice(blocks, _PIECE_BYTES // BLOCK_BYTES))
