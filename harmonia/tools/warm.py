"""Cache warming: compresses NARs into the server's cache before the first download.

Runs at the lowest CPU and disk priority, and never evicts: NARs that do not fit are skipped.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, Self

import msgspec

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.frame_index import index_files
from harmonia.cache.growing_file import CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, StoreObjectError
from harmonia.nix.store_path import StorePath
from harmonia.store.file_reader import Step
from harmonia.store.store import Store
from harmonia.store.store_nar import StoreNar

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

    def __init__(self, nar: StoreNar, progress: Callable[[int], None]) -> None:
        self._nar = nar
        self._progress = progress
        self._read: list[int] = []
        self.size, self.sha256 = nar.size, nar.sha256
        self.failure = "see the log above"

    def __str__(self) -> str:
        return str(self._nar)

    def share(self) -> Self:
        return self  # it holds nothing

    def close(self) -> None:
        pass

    def read(self, start: int, stop: int) -> Generator[Step]:
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


def become_owner(settings: Settings) -> Settings:
    """Switch from root to the owner of the cache directory, so that the server can read the new files.

    Return settings with a path to the directory that the new user can open. Raises ConfigError if the server does not
    compress. Raises ConfigError if the directory belongs to another user and this process is not root.
    """
    if not settings.enable_compression:
        raise ConfigError("enable_compression is false: this server has no cache of compressed NARs")
    cache_dir = directory = os.path.abspath(str(settings.cache_dir))
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    owner = os.stat(directory)
    if owner.st_uid == os.geteuid() or directory != cache_dir:
        return settings
    if os.geteuid() != 0:
        raise ConfigError(f"cache_dir: {directory!r} belongs to another user; run this as root or as that user")
    opened = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY)  # only root can traverse systemd's /var/cache/private
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
    return msgspec.structs.replace(settings, cache_dir=f"/proc/self/fd/{opened}")


def warm(
    settings: Settings, store: Store, paths: Iterable[StorePath], progress: Callable[[int], None] = lambda _: None
) -> Iterator[Result]:
    """Yield a result for each path, in the order of completion.

    Calls `progress` with the number of NAR bytes done since the last call. Raises ConfigError if the cache is not
    writable.
    """
    directory = os.path.join(str(settings.cache_dir), "nar")
    try:
        cache = DiskCache(directory, settings.cache_bytes)
    except OSError as error:
        what = f"cache_dir: cannot write {directory!r}: {error.strerror}; run this as root or as the user of the server"
        raise ConfigError(what) from None
    compressor = Compressor(settings.zstd, cache, index_files(settings))
    layouts = Layouts()
    filling: dict[StorePath, tuple[CachedFile, _TrackedNar]] = {}
    room, checked_at = 0, float("-inf")
    for path in paths:
        try:
            info = store.path_info(path.hash_part)
        except StoreObjectError as error:
            yield Result(path, "failed", str(error))
            continue
        if info is None:
            continue  # garbage-collected meanwhile
        if compressor.files.has_file(info.nar_hash):
            progress(info.nar_size)
            yield Result(path, "there")
            continue
        if time.monotonic() - checked_at > _CHECK_INTERVAL_S:
            yield from _filled(filling, 0)
            room, checked_at = cache.room(), time.monotonic()
        if _max_disk_bytes(info.nar_size) > room:
            progress(info.nar_size)
            yield Result(path, "too large")
            continue
        room -= _max_disk_bytes(info.nar_size)
        nar = _TrackedNar(StoreNar(info, store.real_path(path), layouts), progress)
        file = compressor.open_file(nar, compressor.encoder.encoding)
        if file is None:
            raise ConfigError(f"cache_dir: cannot write {directory!r}; see the log above")
        filling[path] = file, nar
        yield from _filled(filling, _MAX_FILLS)
    yield from _filled(filling, 0)


def _filled(filling: dict[StorePath, tuple[CachedFile, _TrackedNar]], max_filling: int) -> Iterator[Result]:
    """Yield results until at most `max_filling` files are being filled."""
    while True:
        for path, (file, nar) in list(filling.items()):
            if (state := _state(file)) is not None:
                del filling[path]
                file.close()
                nar.finish()
                yield Result(path, state, "" if state == "compressed" else nar.failure)
        if len(filling) <= max_filling:
            return
        time.sleep(_POLL_S)


def _max_disk_bytes(size: int) -> int:
    """Return the most disk space in bytes that a NAR of that size can take, in whole blocks, with its trailer.

    The bound for the compressed NAR is ZSTD_COMPRESSBOUND in zstd.h.
    """
    return size + size // 256 + 8192


def _state(file: CachedFile) -> State | None:
    file.refresh()
    if not file.whole and file.lock():  # no process fills this file any more
        file.refresh()
        return "compressed" if file.whole else "failed"
    return "compressed" if file.whole else None
