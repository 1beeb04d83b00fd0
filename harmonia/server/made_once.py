"""Cache of pages and listings that are costly to make: single flight, LRU in memory, files for the large ones."""

import asyncio
from collections.abc import Callable, Generator, Hashable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

from cachetools import LRUCache

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import CachedFile
from harmonia.errors import CacheFileError
from harmonia.ownership import hand_over
from harmonia.process.fair_executor import FairExecutor
from harmonia.process.single_flight import SingleFlight
from harmonia.store.file_reader import OpenSlice

_THREADS = 2  # few, because they hold the GIL most of the time
_THREADS_PER_CLIENT = 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Made(Generic[_T]):
    value: _T
    size: int


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A complete file of the cache, as a body."""

    file: CachedFile
    is_new: bool = False
    """True if the file was written for this request, or for another one at the same time."""

    @property
    def size(self) -> int:
        return self.file.size

    def close(self) -> None:
        self.file.close()

    def read(self, start: int, stop: int | None) -> Generator[OpenSlice]:
        part = self.file.slice(start, self.size if stop is None else stop)
        yield part
        if len(part):
            raise CacheFileError("the cache file was truncated")

    def chunks(self) -> Generator[bytes]:
        """Yield all bytes. Blocks on the disk. Raises CacheFileError if the file is truncated."""
        for part in self.read(0, None):
            while data := part.read():
                yield data


class MadeOnce:
    """Cache for one event loop."""

    def __init__(self, limit: int, files: DiskCache | None) -> None:
        """Create a cache with at most `limit` bytes of values in memory. `files` is None if no disk is writable."""
        self._files = files
        self._values: MutableMapping[Hashable, _Made[Any]] = LRUCache(limit, getsizeof=attrgetter("size"))
        self._flights = SingleFlight()
        self._threads = FairExecutor(_THREADS, _THREADS_PER_CLIENT, "make")

    def __contains__(self, key: Hashable) -> bool:
        """Return True if the value for a key is in memory."""
        return key in self._values

    async def value(self, key: Hashable, client: Hashable, make: Callable[[], _T], size: Callable[[_T], int]) -> _T:
        """Return the cached value for a key. If there is none, run `make` in a thread, fairly between clients.

        `size` returns the bytes of memory that a value takes.
        """
        if (made := self._values.get(key)) is not None:
            return made.value  # type: ignore[no-any-return]
        return await self._flights.run(key, lambda: self._make(key, client, make, size))

    async def file(self, key: str, client: Hashable, make: Callable[[], Iterable[bytes]]) -> MadeFile | None:
        """Return the cached file for a key. If there is none or it is damaged, write the pieces of `make` to a new one.

        The caller closes it. Return None if the disk fails, or while another worker writes the file.
        """
        if self._files is None:
            return None
        files = self._files
        is_new = await self._flights.run(
            key, lambda: asyncio.wrap_future(self._threads.submit(client, files.write_file, key, make))
        )
        return await hand_over(self._threads.submit(client, _open_file, files, key, is_new))

    def open_file(self, key: str) -> MadeFile:
        """Return a cached file, to be closed. Raise CacheFileError if the file was evicted."""
        file = self._files.find_file(key) if self._files is not None else None
        if file is None:
            raise CacheFileError("it was evicted")
        return MadeFile(file)

    async def _make(self, key: Hashable, client: Hashable, make: Callable[[], _T], size: Callable[[_T], int]) -> _T:
        value = await asyncio.wrap_future(self._threads.submit(client, make))
        with suppress(ValueError):  # larger than the whole cache
            self._values[key] = _Made(value, size(value))
        return value


def _open_file(files: DiskCache, key: str, is_new: bool) -> MadeFile | None:  # noqa: FBT001 (a callback of a thread)
    file = files.find_file(key)
    return None if file is None else MadeFile(file, is_new)
