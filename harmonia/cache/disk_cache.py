"""Disk cache of bounded size, shared by any number of processes, with single-flight fills and LRU eviction.

One process fills a file, while all others read the growing file (growing_file.py). If the filler dies, another process
may replace it, because a key always has the same content. No function waits for another process.
"""

import errno
import fcntl
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import TTLCache

from harmonia.cache.growing_file import GROWING, READ_FLAGS, SUMS, CachedFile, Filler, ending
from harmonia.config.settings import Settings
from harmonia.ownership import closed_on_error
from harmonia.untrusted import integer

_SPARE_BYTES = 1 << 30  # left free on the disk, or a twentieth of a small disk
_DEFAULT_MAX_BYTES = 20 << 30
_EVICTIONS_PER_LIMIT = 64  # evict each time a 64th of the limit was written, which bounds the excess
_TOUCH_INTERVAL_S = 60.0  # resolution of the time of the last use
_USES = "user.harmonia.uses"  # extended attribute of a file
_MAX_USES = 1 << 32
_BARE_MODE = 0o711  # of the directory: other programs can open files whose names they know
_UNUSED_AGE_S = 86400.0  # of the LRU time of a file that nobody has used yet
_WRITE_BYTES = 64 * 1024  # per write of small pieces
_ORPHAN_AGE_S = 60.0  # of digests without a file, which may get its name in a moment
_INTACT_S = 3600.0  # for which a verified file counts as intact
_MAX_INTACT = 65536  # files that are known to be intact, some 430 bytes each
_RETRY_S = 60.0  # until the next try to write to a disk that has failed

_log = logging.getLogger("harmonia")


@dataclass
class Counters:
    """Counts of events since the start of the process."""

    hits: int = 0
    misses: int = 0
    fills: int = 0
    filled_bytes: int = 0
    evictions: int = 0
    corrupt: int = 0


class CacheEntry(NamedTuple):
    """A file of the cache. Entries compare by the time of their last use."""

    used_at: float
    """In seconds since 1970."""
    size: int
    """Bytes of disk space."""
    path: str


class DiskCache:
    """The files in `directory`, by key. Thread-safe."""

    on_removal: Callable[[], object]
    """Callback after files were evicted or discarded. It must return quickly."""

    def __init__(self, directory: str, limit: int | None = None, growing: str = GROWING, *, bare: bool = False) -> None:
        """Create the directory, or make it private.

        If `bare`, all users that can reach the directory can read its files, if they know the name. Each file that is
        filled has only its content, so that other programs can send it (growing_file.py).

        `growing` is the suffix of growing files. Processes with other suffixes do not wait for these files. It ends in
        GROWING.

        `limit` is the maximum size in bytes. The default is half of the free space and the cache, at most 20 GiB.
        Raises OSError if the directory cannot be created or written to.
        """
        self.counters = Counters()
        self.on_removal = _nothing
        self._directory = directory
        self._growing = growing
        self._bare = bare
        self._intact: TTLCache[Hashable, bool] = TTLCache(_MAX_INTACT, _INTACT_S)
        self._lock = threading.Lock()
        self._unusable_until = 0.0
        _make_directory(directory, _BARE_MODE if bare else 0o700)
        disk = os.statvfs(directory)
        self._spare = min(_SPARE_BYTES, disk.f_blocks * disk.f_frsize // 20)
        self.limit = limit if limit is not None else min(_DEFAULT_MAX_BYTES, (self._free() + self.used()) // 2)
        self._added_bytes = self.limit
        """Bytes added since the last eviction. At first as many as the limit, so that the first file starts one."""

    def path(self, key: str) -> str:
        """Return the path of the file with this key."""
        return f"{self._directory}/{key}"

    def entries(self, *, growing: bool = False) -> list[CacheEntry]:
        """Return an entry for each complete file and, with `growing`, for each growing one.

        Raises OSError if the directory cannot be read.
        """
        files = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if not entry.name.endswith(SUMS) and (growing or not entry.name.endswith(GROWING)):
                        status = entry.stat(follow_symlinks=False)
                        files.append(CacheEntry(status.st_mtime, status.st_blocks * 512, entry.path))
        return files

    def keys(self) -> list[str]:
        """Return the keys of all complete files.

        Raises OSError if the directory cannot be read.
        """
        return [os.path.basename(entry.path) for entry in self.entries()]

    def has(self, key: str) -> bool:
        """Return True if the cache has the complete file."""
        if file := self.find_file(key):
            file.close()
        return file is not None

    def is_growing(self, key: str) -> bool:
        """Return True if a process with the suffix GROWING fills the file of a key, or died while it did."""
        return os.path.lexists(self.path(key) + GROWING)

    def remove(self, key: str, *, unused_since: float | None = None) -> bool:
        """Remove the file, unless it was used after `unused_since`. Its readers can continue.

        Return True if it was removed, False if it does not exist or was used.
        """
        with suppress(OSError):
            if unused_since is None or os.stat(self.path(key)).st_mtime <= unused_since:
                _unlink(self.path(key))
                return True
        return False

    def mark_unused(self, key: str) -> None:
        """Give a complete file an old LRU time, which its first use in any process replaces."""
        with suppress(OSError):
            old = time.time() - _UNUSED_AGE_S
            os.utime(self.path(key), (old, old))

    def remove_unused(self, key: str) -> None:
        """Remove a file, unless it was used since `mark_unused`. Its readers can continue."""
        self.remove(key, unused_since=time.time() - _UNUSED_AGE_S / 2)

    def find_file(self, key: str) -> CachedFile | None:
        """Return the complete file, or None if it does not exist or cannot be opened. The caller closes it."""
        with suppress(OSError):
            return self._find_file(key)
        return None

    def use_file(self, key: str) -> CachedFile | None:
        """Return the complete file or None, like `find_file`. If it exists, count a hit and refresh its LRU time."""
        with suppress(OSError):
            return self._use(key)
        return None

    def _use(self, key: str) -> CachedFile | None:
        if file := self._find_file(key):
            self.counters.hits += 1
            self.touch(key)
        return file

    def open_file(self, key: str) -> tuple[CachedFile, Filler | None] | None:
        """Return the complete or growing file, and a filler if no other process fills it. The caller closes both.

        Returns None if the disk cannot be written to, or failed less than a minute ago.
        """
        try:
            while True:
                if file := self._use(key):
                    return file, None
                if self._unusable_until:
                    if time.monotonic() < self._unusable_until:
                        return None
                    self._unusable_until = 0.0
                    self.evict()  # other programs may have filled the disk
                if opened := self._open_growing(key):
                    self.counters.misses += 1
                    return opened
        except OSError as error:
            self.note_failure(error)
            return None

    def add(self, key: str, content: bytes, sha256: bytes | None = None) -> bool:
        """Add a small file in as few steps as possible, or replace it. If the disk fails, log it, and return False.

        `sha256` is the SHA-256 of the content, if the caller knows it. No other process can read the file while it is
        written. It is not flushed: if the machine crashes before the kernel has written it to the disk, the digests
        show that it is incomplete.
        """
        if time.monotonic() < self._unusable_until:
            return False
        sha256 = sha256 or hashlib.sha256(content).digest()
        unfinished = f"{self.path(key)}-{threading.get_native_id()}{GROWING}"
        try:
            with open(unfinished, "xb", buffering=0, opener=_create_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # otherwise, a sweep would take it for that of a dead process
                if not os.fstat(file.fileno()).st_nlink:  # a sweep was faster
                    return self.add(key, content, sha256)
                data = memoryview(content + ending(content, sha256))
                while data:
                    data = data[file.write(data) :]
                os.rename(unfinished, self.path(key))
        except OSError as error:
            with suppress(OSError):
                os.unlink(unfinished)
            self.note_failure(error)
            return False
        self.counters.misses += 1
        self.note_filled(len(content))
        return True

    def write_file(self, key: str, make: Callable[[], Iterable[bytes]]) -> bool:
        """Write the pieces that `make` returns to the file of a key. Return True if that was done.

        Does nothing if the file exists, if another process writes it, or if the disk fails, which is logged. An error
        of `make` leaves no file; an OSError is not raised.
        """
        opened = self.open_file(key)
        if opened is None:
            return False
        reader, filler = opened
        reader.close()
        if filler is None:
            return False
        try:
            with suppress(OSError):
                pieces = iter(make())
                while part := _next_bytes(pieces, _WRITE_BYTES):
                    filler.append(part)
                filler.commit()
                return True
        finally:
            filler.abandon()  # no effect after a commit
        return False

    def mark_intact(self, file: CachedFile) -> None:
        """Remember for an hour that a file was read from its first byte to its last, and each block had its digest."""
        with self._lock:
            self._intact[file.identity()] = True

    def is_intact(self, file: CachedFile) -> bool:
        """Return True if this process called `mark_intact` for the file less than an hour ago."""
        with self._lock:
            return file.identity() in self._intact

    def discard(self, file: CachedFile) -> None:
        """Remove a file whose content changed after it was written, unless another file has replaced it."""
        path = str(file.path)
        with self._lock:
            self._intact.pop(file.identity(), None)
        with suppress(OSError):
            if not file.is_at(path):
                return
            _unlink(path)
        self.counters.corrupt += 1
        _log.error("removed a damaged file from the cache: %s; check the disk for faults if this repeats", path)
        self.on_removal()

    def note_failure(self, error: OSError) -> None:
        """Stop adding files to the cache for a minute, and log the error once."""
        is_logged, self._unusable_until = time.monotonic() < self._unusable_until, time.monotonic() + _RETRY_S
        if not is_logged:
            _log.error("cannot write to the cache %s: %s; serving without it", self._directory, error.strerror)

    def note_filled(self, size: int) -> None:
        """Count a completed file of `size` bytes, and evict others if necessary."""
        self.counters.fills += 1
        self.counters.filled_bytes += size
        self._added_bytes += size
        if self._added_bytes * _EVICTIONS_PER_LIMIT > self.limit:
            self._added_bytes = 0
            with suppress(OSError):
                self.evict()

    def room(self) -> int:
        """Return the number of bytes that can be added without an eviction. Growing files count as they are now.

        Raises OSError if the directory cannot be read.
        """
        used = sum(entry.size for entry in self.entries(growing=True))
        return min(self.limit - used, self._free() - self._spare)

    def used(self) -> int:
        """Return the disk space of the complete files in bytes.

        Raises OSError if the directory cannot be read.
        """
        return self.usage()[0]

    def usage(self) -> tuple[int, float]:
        """Return `used`, and the time of the least recent use in seconds since 1970, or 0 without files.

        Raises OSError if the directory cannot be read.
        """
        entries = self.entries()
        return sum(entry.size for entry in entries), min((entry.used_at for entry in entries), default=0.0)

    def evict(self) -> None:
        """Remove the least recently used files, until the cache is within its limit and the disk has its spare space.

        Raises OSError if the directory cannot be read.
        """
        self.sweep()
        entries = self.entries()
        excess = max(sum(entry.size for entry in entries) - self.limit, self._spare - self._free())
        before = self.counters.evictions
        too_large = [entry for entry in entries if entry.size > self.limit]
        others = [entry for entry in entries if entry.size <= self.limit]
        for entry in sorted(too_large) + sorted(others):  # the least recently used first
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                _unlink(entry.path)
                self.counters.evictions += 1
            excess -= entry.size  # also if another process has removed the file
        if self.counters.evictions > before:
            self.on_removal()

    def sweep(self) -> None:
        """Remove growing files whose fillers died.

        Raises OSError if the directory cannot be read.
        """
        _sweep(self._directory)

    def _free(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def _find_file(self, key: str) -> CachedFile | None:
        path = self.path(key)
        if not os.access(path, os.F_OK):  # less than half the time of an error of `open`
            return None
        try:
            file = CachedFile(os.open(path, READ_FLAGS), path, self)
        except FileNotFoundError:
            return None
        with closed_on_error(file):
            file.refresh()
            if file.whole:
                return file
            with suppress(FileNotFoundError):
                if file.is_at(path):  # otherwise, it was evicted before its digests were opened
                    self._remove_incomplete(path, file)
        file.close()
        return None

    def _remove_incomplete(self, path: str, file: CachedFile) -> None:
        if self._bare and not os.path.exists(path + SUMS):  # lost in a crash, or in an eviction just before its fill
            _unlink(path)
        else:
            self.discard(file)

    def touch(self, key: str) -> None:
        """Refresh the LRU time of a complete file, and count its use, both at most once a minute."""
        path = self.path(key)
        with suppress(OSError):
            if _age_s(path) > _TOUCH_INTERVAL_S:
                os.utime(path)
                if (uses := self.uses(key)) is not None:
                    os.setxattr(path, _USES, b"%d" % (uses + 1))

    def uses(self, key: str) -> int | None:
        """Return the number of minutes in which a complete file was used, without the minute in which it was filled.

        Returns None if the file does not exist, or if the file system has no extended attributes.
        """
        try:
            return integer(os.getxattr(self.path(key), _USES), _MAX_USES)
        except OSError as error:
            return 0 if error.errno == errno.ENODATA else None

    def _open_growing(self, key: str) -> tuple[CachedFile, Filler | None] | None:
        """Return the growing file like `open_file`, or None if it was just completed or removed."""
        path = self.path(key)
        growing = path + self._growing
        descriptor = os.open(growing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        file = CachedFile(descriptor, path, self)
        with closed_on_error(file):
            if not file.lock():
                return file, None
            with suppress(FileNotFoundError):
                if file.is_at(growing):
                    file.refresh()
                    # A complete file may have readers, although its filler died before the rename.
                    if not file.whole and not os.path.exists(path):
                        return self._begin_fill(file, path, growing)
                    os.unlink(growing)
        file.close()
        return None

    def _begin_fill(self, file: CachedFile, path: str, growing: str) -> tuple[CachedFile, Filler]:
        """Remove what an earlier filler has left, and return a reader and a filler, which takes over `file`."""
        file.empty()
        with suppress(FileNotFoundError):
            os.unlink(path + SUMS)
        reader = CachedFile(os.open(growing, READ_FLAGS), path, self)
        return reader, Filler(path, growing, file.detach(), self.note_filled, self.note_failure, bare=self._bare)


def open_cache(
    settings: Settings,
    name: str,
    what: str,
    max_bytes: int | None = None,
    level: int = logging.DEBUG,
    *,
    bare: bool = False,
) -> DiskCache | None:
    """Return the cache in the folder `name` of `cache_dir`, or None if the folder cannot be written.

    In that case, log at this `level` that `what` cannot be kept. `bare` is that of DiskCache.
    """
    limits = [limit for limit in (settings.cache_bytes, max_bytes) if limit is not None]
    try:
        return DiskCache(os.path.join(str(settings.cache_dir), name), min(limits, default=None), bare=bare)
    except OSError as error:
        _log.log(level, "cannot keep %s: %s: %s; make cache_dir writable", what, error.filename, error.strerror)
        return None


def is_bare(directory: str) -> bool:
    """Return True if the directory of a cache is one of `bare` files. Raises OSError if it cannot be read."""
    return os.stat(directory).st_mode & 0o777 == _BARE_MODE


def sweep_all(parent: str) -> None:
    """Remove growing files whose fillers died from all caches in the directory `parent`."""
    with suppress(OSError):
        with os.scandir(parent) as entries:
            directories = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for directory in directories:
            _sweep(directory)


def _sweep(directory: str) -> None:
    with os.scandir(directory) as entries:
        names = {entry.name for entry in entries}
    for name in names:
        path = f"{directory}/{name}"
        with suppress(OSError):
            if name.endswith(GROWING):
                with closing(CachedFile(os.open(path, READ_FLAGS))) as file:
                    if file.lock() and file.is_at(path):
                        os.unlink(path)
            elif name.endswith(SUMS) and _is_orphan(name.removesuffix(SUMS), names) and _age_s(path) > _ORPHAN_AGE_S:
                os.unlink(path)


def _is_orphan(key: str, names: Collection[str]) -> bool:
    """Return True if a key has neither a complete file nor a growing one, whose verification may take minutes."""
    return key not in names and not any(name.startswith(key) and name.endswith(GROWING) for name in names)


def _age_s(path: str) -> float:
    """Return the seconds since a file was used or written. Raises OSError if it does not exist."""
    return time.time() - os.stat(path).st_mtime


def _unlink(path: str) -> None:
    """Remove a file and its digests. Raises OSError if the file does not exist."""
    os.unlink(path)
    with suppress(FileNotFoundError):
        os.unlink(path + SUMS)


def _next_bytes(pieces: Iterator[bytes], least: int) -> bytes:
    """Return the next pieces joined, until they have at least so many bytes. Empty at the end."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= least:
            break
    return b"".join(parts)


def _create_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _nothing() -> None:
    pass


def _make_directory(directory: str, mode: int) -> None:
    """Create a directory with this mode, or give it to an existing directory.

    Raises OSError if that fails, for example because it belongs to another user, or is a symlink.
    """
    os.makedirs(os.path.dirname(directory) or ".", exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, mode)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077 != mode & 0o077:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
