"""Cache warming: compresses NARs into the server's cache before the first download.

Runs at the lowest CPU and disk priority, and never evicts: NARs that do not fit are skipped. A download never waits for
it: it compresses the same NAR itself, into another growing file, and then warming gives way.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, Self

from harmonia.cache.compressed_files import file_key
from harmonia.cache.disk_cache import Counters, DiskCache
from harmonia.cache.frame_index import index_files
from harmonia.cache.growing_file import GROWING, CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, StoreObjectError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store.file_reader import Step
from harmonia.store.store import Store
from harmonia.store.store_nar import StoreNar

_GROWING = f".warm{GROWING}"
_MAX_FILLS = 8  # NARs compressed at the same time, so that small ones do not wait for each other's disk access
_POLL_S = 0.005
_CHECK_INTERVAL_S = 5.0  # how often to measure the free space of the cache, which the server fills too

State = Literal["compressed", "there", "too large", "failed"]


class Result(NamedTuple):
    path: StorePath
    state: State
    what: str = ""


class _TrackedNar:
    """NAR to compress. Calls `progress` with the number of bytes read."""

    def __init__(self, nar: StoreNar, progress: Callable[[int], None], is_taken: Callable[[], bool]) -> None:
        """`is_taken` returns True if a download compresses the NAR."""
        self._nar = nar
        self._progress = progress
        self._is_taken = is_taken
        self._read: list[int] = []
        self.size, self.sha256 = nar.size, nar.sha256
        self.failure = "see the log above"
        self.gave_way = False

    def __str__(self) -> str:
        return str(self._nar)

    def share(self) -> Self:
        return self  # it holds nothing

    def close(self) -> None:
        pass

    def read(self, start: int, stop: int) -> Generator[Step]:
        if self._is_taken():
            self.gave_way = True
            raise InterruptedError
        try:
            yield from self._nar.read(start, stop)
        except OSError as error:  # the compressor does not log this error
            self.failure = f"{os.fsdecode(error.filename or str(self))}: {error.strerror}"
            raise
        self._read.append(stop - start)  # append is atomic; several threads read
        self._progress(stop - start)

    def finish(self) -> None:
        """Report the bytes that were not read as done, because another process compressed the NAR or it failed."""
        self._progress(self.size - sum(self._read))


def lower_priority() -> None:
    """Set this process to the lowest priority. Disk access gets the idle class with it (ioprio_set(2))."""
    with suppress(OSError):  # a service's system call filter may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Warmer:
    """The cache, to be warmed. Used by one thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        """Open the cache. Raises ConfigError if it is not writable. `store` is used by the caller's thread."""
        directory = os.path.join(str(settings.cache_dir), "nar")
        try:
            self._cache = DiskCache(directory, settings.cache_bytes, _GROWING, bare=settings.nginx_location is not None)
        except OSError as error:
            what = f"cache_dir: cannot write {directory!r}: {error.strerror}"
            raise ConfigError(f"{what}; run this as root or as the user of the server") from None
        self.compressor = Compressor(settings.zstd, self._cache, index_files(settings))
        self._layouts = Layouts()
        self._store = store
        self._failure = ConfigError(f"cache_dir: cannot write {directory!r}; see the log above")

    @property
    def counters(self) -> Counters:
        """Return the counts of the cache's events in this process."""
        return self._cache.counters

    def warm(self, paths: Iterable[StorePath], progress: Callable[[int], None] = lambda _: None) -> Generator[Result]:
        """Yield a result for each path, in the order of completion.

        Calls `progress` with the number of NAR bytes done since the last call. Raises ConfigError if the cache is not
        writable.
        """
        files = self.compressor.files
        filling: dict[StorePath, tuple[CachedFile, _TrackedNar]] = {}
        room, checked_at = 0, float("-inf")
        try:
            for path in paths:
                try:
                    info = self._store.path_info(path.hash_part)
                except StoreObjectError as error:
                    yield Result(path, "failed", str(error))
                    continue
                if info is None or path in filling:
                    continue  # garbage-collected meanwhile, or named twice
                if files.has_file(info.nar_hash):
                    progress(info.nar_size)
                    yield Result(path, "there")
                    continue
                if time.monotonic() - checked_at > _CHECK_INTERVAL_S:
                    yield from _filled(filling, 0)
                    room, checked_at = self._cache.room(), time.monotonic()
                if _max_disk_bytes(info.nar_size) > room:
                    progress(info.nar_size)
                    yield Result(path, "too large")
                    continue
                room -= _max_disk_bytes(info.nar_size)
                nar = self._tracked_nar(info, progress)
                file = self.compressor.open_file(nar, self.compressor.encoder.encoding)
                if file is not None:
                    filling[path] = file, nar
                elif self.compressor.is_damaged(nar):
                    yield Result(path, "failed", nar.failure)
                else:
                    raise self._failure
                yield from _filled(filling, _MAX_FILLS)
            yield from _filled(filling, 0)
        finally:
            for file, _ in filling.values():
                file.close()

    def _tracked_nar(self, info: PathInfo, progress: Callable[[int], None]) -> _TrackedNar:
        nar = StoreNar(info, self._store.real_path(info.path), self._layouts)
        key = file_key(info.nar_hash, self.compressor.encoder.encoding)
        return _TrackedNar(nar, progress, lambda: self._cache.is_growing(key))


def _filled(filling: dict[StorePath, tuple[CachedFile, _TrackedNar]], max_filling: int) -> Iterator[Result]:
    """Yield results until at most `max_filling` files are being filled."""
    while True:
        for path, (file, nar) in list(filling.items()):
            if (state := _state(file)) is not None:
                del filling[path]
                file.close()
                nar.finish()
                yield Result(path, "there" if nar.gave_way else state, "" if state == "compressed" else nar.failure)
        if len(filling) <= max_filling:
            return
        time.sleep(_POLL_S)


def _max_disk_bytes(size: int) -> int:
    """Return the most disk space in bytes that a NAR of that size can take, in whole blocks, with its trailer.

    The bound for the compressed NAR is ZSTD_COMPRESSBOUND in zstd.h.
    """
    return size + size // 256 + 8192


def _state(file: CachedFile) -> State | None:
    """Return the result, or None as long as a process fills the file, or has not added it to the cache yet."""
    if not file.lock():
        return None
    file.refresh()
    return "compressed" if file.whole else "failed"
