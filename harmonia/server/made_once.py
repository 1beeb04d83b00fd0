"""Cache of what is costly to make of a store path: single flight, LRU in memory, and files for what is large."""

import asyncio
from collections.abc import Callable, Generator, Hashable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

from cachetools import LRUCache

from harmonia.cache.disk_cache import NarCache
from harmonia.cache.fair_executor import FairExecutor
from harmonia.cache.growing_file import CachedFile
from harmonia.errors import CacheFileError
from harmonia.process.single_flight import SingleFlight
from harmonia.store.file_reader import OpenSlice

_THREADS = 2  # they hold the interpreter most of the time
_THREADS_PER_CLIENT = 1  # for one client
_WRITE_BYTES = 64 * 1024  # at once

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Made(Generic[_T]):
    value: _T
    size: int


@dataclass(frozen=True, slots=True)
class MadeFile:
    """The content of a whole file of the cache, as a body."""

    file: CachedFile

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, start: int, stop: int | None) -> Generator[OpenSlice]:
        part = self.file.slice(start, self.size if stop is None else stop)
        yield part
        if len(part):
            raise CacheFileError("its file in the cache was cut short")

    def chunks(self) -> Generator[bytes]:
        """All of it."""
        for part in self.read(0, None):
            while data := part.read():
                yield data


class MadeOnce:
    """For one event loop. Values take at most `limit` bytes of memory."""

    def __init__(self, limit: int, files: NarCache | None) -> None:
        self._files = files
        self._values: MutableMapping[Hashable, _Made[Any]] = LRUCache(limit, getsizeof=attrgetter("size"))
        self._flights = SingleFlight()
        self._threads = FairExecutor(_THREADS, _THREADS_PER_CLIENT, "make")

    async def value(self, key: Hashable, client: Hashable, make: Callable[[], _T], size: Callable[[_T], int]) -> _T:
        """Return what `make` made for that key, in a thread; `size` is how many bytes it takes."""
        if (made := self._values.get(key)) is not None:
            return made.value  # type: ignore[no-any-return]
        return await self._flights.run(key, lambda: self._make(key, client, make, size))

    async def file(self, key: str, client: Hashable, make: Callable[[], Iterable[bytes]]) -> MadeFile | None:
        """Return the kept file with what `make` gives. None if the disk does not let us, or if another worker fills it.

        A damaged one is made again.
        """
        if self._files is None:
            return None
        files = self._files
        return await self._flights.run(
            key, lambda: asyncio.wrap_future(self._threads.submit(client, _kept, files, key, make))
        )

    async def _make(self, key: Hashable, client: Hashable, make: Callable[[], _T], size: Callable[[_T], int]) -> _T:
        value = await asyncio.wrap_future(self._threads.submit(client, make))
        with suppress(ValueError):  # it is larger than the whole cache
            self._values[key] = _Made(value, size(value))
        return value


def _kept(files: NarCache, key: str, make: Callable[[], Iterable[bytes]]) -> MadeFile | None:
    opened = files.open_file(key)
    if opened is None:
        return None
    file, filler = opened
    if filler is None:
        return MadeFile(file) if file.whole else None
    try:
        parts: list[bytes] = []
        size = 0
        for piece in make():
            parts.append(piece)
            size += len(piece)
            if size >= _WRITE_BYTES:
                filler.append(b"".join(parts))
                parts, size = [], 0
        filler.append(b"".join(parts))
        filler.commit()
    except OSError:  # of the disk: the cache has logged it
        return None
    finally:
        filler.abandon()  # unless it was committed
    file.refresh()
    return MadeFile(file)
