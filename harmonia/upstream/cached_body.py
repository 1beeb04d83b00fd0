"""Body of an upstream NAR in the cache, complete or growing, with a fallback to the upstream if it stops growing."""

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing

from harmonia.cache.growing_file import CachedFile
from harmonia.errors import StoreObjectError
from harmonia.process.thread_reader import Submit, read_in_threads
from harmonia.store.file_reader import Chunk, OpenSlice
from harmonia.upstream.passthrough_body import PassthroughBody
from harmonia.upstream.transfer import Transfer


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
