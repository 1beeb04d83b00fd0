"""Fills the cache of compressed NARs ahead of those who will ask for them, as the server would fill it.

It gives way to everything else on the machine, and adds only what the cache can take without losing anything.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

import msgspec

from harmonia.cache.disk_cache import NarCache
from harmonia.cache.frame_index import index_files
from harmonia.cache.growing_file import CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, StoreObjectError
from harmonia.nix.store_path import StorePath
from harmonia.store.file_reader import Chunk
from harmonia.store.store import Store
from harmonia.store.store_nar import StoreNar

_MAX_FILLS = 8  # NARs, so that small ones do not wait for each other's disk
_POLL_S = 0.005  # seconds
_CHECK_INTERVAL_S = 5.0  # seconds between two looks at how much the cache can take, which others fill too
_LAYOUT_MEMORY_BYTES = 16 * 1024 * 1024  # bytes

State = Literal["compressed", "there", "too large", "failed"]


class Result(NamedTuple):
    path: StorePath
    state: State
    what: str = ""


class _Heard:
    """A NAR to be compressed, of which `progress` hears as it is read."""

    def __init__(self, nar: StoreNar, progress: Callable[[int], None]) -> None:
        self._nar = nar
        self._progress = progress
        self._read: list[int] = []
        self.size, self.sha256 = nar.size, nar.sha256
        self.why_not = "the log above tells why"

    def __str__(self) -> str:
        return str(self._nar)

    def read(self, start: int, stop: int) -> Generator[Chunk]:
        try:
            yield from self._nar.read(start, stop)
        except OSError as error:  # which the log leaves to who reads it next
            self.why_not = f"{os.fsdecode(error.filename or str(self))}: {error.strerror}"
            raise
        self._read.append(stop - start)  # by several threads
        self._progress(stop - start)

    def over(self) -> None:
        """Nobody reads any more of it: another process may have, or it cannot be."""
        self._progress(self.size - sum(self._read))


def give_way() -> None:
    """Run only when nobody else wants to. Reads and writes get the idle class with it (ioprio_set(2))."""
    with suppress(OSError):  # a service's system call filter may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def take_owner(settings: Settings) -> Settings:
    """Become the owner of the cache directory, if root, so that the server can read what we add.

    Returns settings by which the new user reaches the directory. Raises ConfigError if the server does not compress, or
    if the directory is not ours.
    """
    if not settings.enable_compression:
        raise ConfigError("enable_compression is false: this server keeps no compressed NARs")
    cache_dir = directory = os.path.abspath(str(settings.cache_dir))
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    owner = os.stat(directory)
    if owner.st_uid == os.geteuid() or directory != cache_dir:
        return settings
    if os.geteuid() != 0:
        raise ConfigError(f"cache_dir: {directory!r} is another user's; run this as root, or as that user")
    opened = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY)  # systemd's /var/cache/private lets only root through
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
    return msgspec.structs.replace(settings, cache_dir=f"/proc/self/fd/{opened}")


def warm(
    settings: Settings, store: Store, paths: Iterable[StorePath], progress: Callable[[int], None] = lambda _: None
) -> Iterator[Result]:
    """What comes of each path, in the order in which they are done. `progress` hears of the bytes of NARs.

    ConfigError where the cache cannot be written.
    """
    directory = os.path.join(str(settings.cache_dir), "nar")
    try:
        cache = NarCache(directory, settings.cache_bytes)
    except OSError as error:
        what = (
            f"cache_dir: cannot write {directory!r}: {error.strerror}; run this as root, or as the user of the server"
        )
        raise ConfigError(what) from None
    compressor = Compressor(settings.zstd, cache, index_files(settings))
    layouts = Layouts(_LAYOUT_MEMORY_BYTES)
    filling: dict[StorePath, tuple[CachedFile, _Heard]] = {}
    room, looked = 0, float("-inf")
    for path in paths:
        try:
            info = store.path_info(path.hash_part)
        except StoreObjectError as error:
            yield Result(path, "failed", str(error))
            continue
        if info is None:
            continue  # deleted just now
        if compressor.has_file(info.nar_hash):
            progress(info.nar_size)
            yield Result(path, "there")
            continue
        if time.monotonic() - looked > _CHECK_INTERVAL_S:
            yield from _filled(filling, 0)
            room, looked = cache.room(), time.monotonic()
        if _bound(info.nar_size) > room:
            progress(info.nar_size)
            yield Result(path, "too large")
            continue
        room -= _bound(info.nar_size)
        nar = _Heard(StoreNar(info, store.real_path(path), layouts), progress)
        file = compressor.open_file(nar, compressor.encoder.encoding)
        if file is None:
            raise ConfigError(f"cache_dir: cannot write {directory!r}; the log above tells why")
        filling[path] = file, nar
        yield from _filled(filling, _MAX_FILLS)
    yield from _filled(filling, 0)


def _filled(filling: dict[StorePath, tuple[CachedFile, _Heard]], most: int) -> Iterator[Result]:
    """Those that are filled, until no more than `most` are not."""
    while True:
        for path, (file, nar) in list(filling.items()):
            if (state := _state(file)) is not None:
                del filling[path]
                file.close()
                nar.over()
                yield Result(path, state, "" if state == "compressed" else nar.why_not)
        if len(filling) <= most:
            return
        time.sleep(_POLL_S)


def _bound(size: int) -> int:
    """What a NAR of that size takes at most (zstd.h, ZSTD_COMPRESSBOUND), with its trailer, in blocks of the disk."""
    return size + size // 256 + 8192


def _state(file: CachedFile) -> State | None:
    file.refresh()
    if not file.whole and file.lock():  # nobody fills it any more
        file.refresh()
        return "compressed" if file.whole else "failed"
    return "compressed" if file.whole else None
