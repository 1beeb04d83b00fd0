"""A bounded cache of files on disk, shared by any number of processes: each file is made once, however many ask for it.

All others read what there is of it while it grows (growing_file.py). Where who fills it dies, another one may take its
place, for the same key always has the same content. Nothing here waits for anybody.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

from harmonia.cache.growing_file import GROWING, CachedFile, Filler
from harmonia.config.settings import Settings
from harmonia.ownership import closed_on_error

_SPARE_BYTES = 1 << 30  # bytes that are left free on the disk, or a twentieth of a small one
_DEFAULT_MAX_BYTES = 20 << 30  # bytes
_EVICTIONS_PER_LIMIT = (
    64  # the cache is looked through whenever this part of its limit was written: that much is it exceeded
)
_TOUCH_INTERVAL_S = 60.0  # seconds; the time of the last use is told no finer than this
_RETRY_S = 60.0  # seconds for which a disk that cannot be written to is not tried again

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW

_log = logging.getLogger("harmonia")


@dataclass
class Counters:
    """What happened since the process began."""

    hits: int = 0
    misses: int = 0
    fills: int = 0
    filled_bytes: int = 0
    evictions: int = 0
    corrupt: int = 0


class NarCache:
    """The files in `directory` by their keys, in at most `limit` bytes; without a limit, in a good part of the disk.

    For any thread. OSError where the directory cannot be made or written to.
    """

    removed: Callable[[], object]
    """Called after files were evicted or discarded. It must not take long."""

    def __init__(self, directory: str, limit: int | None = None) -> None:
        self.counters = Counters()
        self.housekeeping = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self.removed = _nothing
        self._directory = directory
        self._unusable_until = 0.0
        _make_private(directory)
        disk = os.statvfs(directory)
        self._spare = min(_SPARE_BYTES, disk.f_blocks * disk.f_frsize // 20)
        self.limit = limit if limit is not None else min(_DEFAULT_MAX_BYTES, (self._free() + self.used()) // 2)
        self._unchecked = self.limit  # so that the first file that is added makes us look

    def path(self, key: str) -> str:
        return f"{self._directory}/{key}"

    def keys(self) -> list[str]:
        """Return the keys of all whole files. Raises OSError."""
        return [os.path.basename(path) for _, _, path in self._files()]

    def has(self, key: str) -> bool:
        """Return whether the file is there, whole."""
        if file := self.find_file(key):
            file.close()
        return file is not None

    def remove(self, key: str) -> None:
        """Remove the file, if it is there. Its readers can go on."""
        with suppress(OSError):
            os.unlink(self.path(key))

    def find_file(self, key: str) -> CachedFile | None:
        """The file, to be closed, if it is there, whole, and ours to read."""
        with suppress(OSError):
            return self._find_file(key)
        return None

    def use_file(self, key: str) -> CachedFile | None:
        """Likewise, for somebody who wants its content: that counts as a use."""
        with suppress(OSError):
            return self._use(key)
        return None

    def _use(self, key: str) -> CachedFile | None:
        if file := self._find_file(key):
            self.counters.hits += 1
            self._touch(key)
        return file

    def open_file(self, key: str) -> tuple[CachedFile, Filler | None] | None:
        """The file, to be closed, whole or growing; and the right to fill it, where nobody does.

        None where the disk does not let us.
        """
        try:
            while True:
                if file := self._use(key):
                    return file, None
                if self._unusable_until:
                    if time.monotonic() < self._unusable_until:
                        return None
                    self._unusable_until = 0.0
                    self.evict()  # others may have filled the disk
                if opened := self._open_growing(key):
                    self.counters.misses += 1
                    return opened
        except OSError as error:
            self.failed(error)
            return None

    def discard(self, path: str, file: CachedFile) -> None:
        """Remove a file whose content changed after it was written, unless another one took its place already."""
        with suppress(OSError):
            if not file.is_at(path):
                return
            os.unlink(path)
        self.counters.corrupt += 1
        _log.error("removed a damaged file from the cache: %s; check that disk for faults if this repeats", path)
        self.removed()

    def failed(self, error: OSError) -> None:
        """Add nothing to the cache for a while, and say so once."""
        known, self._unusable_until = time.monotonic() < self._unusable_until, time.monotonic() + _RETRY_S
        if not known:
            _log.error("cannot write to %s, doing without that cache: %s", self._directory, error.strerror)

    def filled(self, size: int) -> None:
        """A file of that size has become whole."""
        self.counters.fills += 1
        self.counters.filled_bytes += size
        self._unchecked += size
        if self._unchecked * _EVICTIONS_PER_LIMIT > self.limit:
            self._unchecked = 0
            with suppress(OSError):
                self.evict()

    def room(self) -> int:
        """How many bytes can be added before something is evicted for them. OSError."""
        return min(self.limit - self.used(), self._free() - self._spare)

    def used(self) -> int:
        """How many bytes of the disk its whole files take. OSError."""
        return sum(size for _, size, _ in self._files())

    def evict(self) -> None:
        """Remove what was used longest ago, until the rest keeps to the limit and leaves the disk its spare space."""
        self.sweep()
        files = self._files()
        excess = max(sum(size for _, size, _ in files) - self.limit, self._spare - self._free())
        before = self.counters.evictions
        # A file that is too large even alone goes before all others.
        for _, size, path in sorted(files, key=lambda it: (it[1] <= self.limit, it)):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
                self.counters.evictions += 1
            excess -= size  # also where another process was faster
        if self.counters.evictions > before:
            self.removed()

    def sweep(self) -> None:
        """Remove growing files whose fillers died. OSError."""
        _sweep(self._directory)

    def _files(self) -> list[tuple[float, int, str]]:
        """When each file was last used, how much it takes on disk, and its path. Without those that are growing."""
        files = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if not entry.name.endswith(GROWING):
                        status = entry.stat(follow_symlinks=False)
                        files.append((status.st_mtime, status.st_blocks * 512, entry.path))
        return files

    def _free(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def _find_file(self, key: str) -> CachedFile | None:
        path = self.path(key)
        try:
            file = CachedFile(os.open(path, _READ), damaged=partial(self.discard, path))
        except FileNotFoundError:
            return None
        with closed_on_error(file):
            file.refresh()
            if file.whole:
                return file
            self.discard(path, file)
        file.close()
        return None

    def _touch(self, key: str) -> None:
        with suppress(OSError):
            if time.time() - os.stat(self.path(key)).st_mtime > _TOUCH_INTERVAL_S:
                os.utime(self.path(key))

    def _open_growing(self, key: str) -> tuple[CachedFile, Filler | None] | None:
        """None where it has just become whole, or was taken away."""
        path = self.path(key)
        growing = path + GROWING
        descriptor = os.open(growing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        file = CachedFile(descriptor)
        with closed_on_error(file):
            if not file.lock():
                return file, None
            with suppress(FileNotFoundError):
                if file.is_at(growing):
                    file.refresh()
                    # One that is whole may be read by somebody, although who filled it died before it got its name.
                    if not file.whole and not os.path.exists(path):
                        if os.fstat(descriptor).st_size:  # what an earlier filler left; else ext4 flushes at each close
                            os.ftruncate(descriptor, 0)
                        reader = CachedFile(os.open(growing, _READ), damaged=partial(self.discard, path))
                        return reader, Filler(path, file.detach(), self.filled, self.failed)
                    os.unlink(growing)
        file.close()
        return None


def sweep_all(parent: str) -> None:
    """Remove growing files whose fillers died from all caches below a directory."""
    with suppress(OSError):
        with os.scandir(parent) as entries:
            directories = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for directory in directories:
            _sweep(directory)


def _sweep(directory: str) -> None:
    with os.scandir(directory) as entries:
        paths = [entry.path for entry in entries if entry.name.endswith(GROWING)]
    for path in paths:
        with suppress(OSError), closing(CachedFile(os.open(path, _READ))) as file:
            if file.lock() and file.is_at(path):
                os.unlink(path)


def _nothing() -> None:
    pass


def open_cache(
    settings: Settings, name: str, what: str, max_bytes: int | None = None, level: int = logging.DEBUG
) -> NarCache | None:
    """Return the cache in the folder `name` of `cache_dir`, or None if the folder cannot be written.

    In that case, log at this `level` that `what` cannot be kept.
    """
    limits = [limit for limit in (settings.cache_bytes, max_bytes) if limit is not None]
    try:
        return NarCache(os.path.join(str(settings.cache_dir), name), min(limits, default=None))
    except OSError as error:
        _log.log(level, "cannot keep %s: %s: %s", what, error.filename, error.strerror)
        return None


def _make_private(directory: str) -> None:
    """Make a directory that only its owner can enter, or make the one that is there private.

    Raises OSError if that is not possible: it belongs to another user, or it is a symlink.
    """
    os.makedirs(os.path.dirname(directory) or ".", exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
