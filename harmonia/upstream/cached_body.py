"""What the cache has of an upstream's NAR, or will have, and what is passed on where that ends."""

from collections.abc import Generator
from concurrent.futures import Future

from harmonia.cache.growing_file import CachedFile
from harmonia.errors import StoreObjectError
from harmonia.store.file_reader import OpenSlice
from harmonia.upstream.passthrough_body import PassthroughBody
from harmonia.upstream.transfer import Transfer


class CachedBody:
    """A NAR in the cache, whole or growing. Where it stops to grow, the rest is passed on."""

    def __init__(
        self,
        file: CachedFile,
        size: int | None = None,
        transfer: Transfer | None = None,
        rest: PassthroughBody | None = None,
    ) -> None:
        """`rest` may be None where the file is whole."""
        self.size = file.size if file.whole else size
        self._file: CachedFile | None = file
        """None once nobody fills it: what is read again, to tell its size before (response.py), is passed on."""
        self._transfer = transfer
        self._rest = rest
        if rest is not None and rest.size is None:
            rest.size = self.size  # by which it knows that it is asked for the whole, which it checks

    def read(self, start: int, stop: int | None) -> Generator[bytes | OpenSlice | Future[bytes] | None]:
        position = start
        if self._file is not None:
            position = yield from self._file.follow(start, stop)
            if self._file.whole:
                self.size = self._file.size
            if self._file.whole or position == stop:
                return
            withdrawn = start < position and self._file.size < position
            self._file.close()  # an error would keep it, and its lock, for which others wait
            self._file = None
            if self._transfer is not None and self._transfer.error is not None:
                raise self._transfer.error
            if withdrawn:
                raise StoreObjectError("what the upstream sent is wrong")
        if self._rest is not None:
            yield from self._rest.read(position, stop)
            self.size = self._rest.size
