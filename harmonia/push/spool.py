"""Spool: pushed NAR files that wait for the narinfo that names them.

A file is stored as it was sent, under the base-32 SHA-256 of its bytes. All workers share the directory. A body that
breaks off leaves nothing: its file has another name, and a lock that the kernel releases if the worker dies.
"""

import errno
import fcntl
import hashlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import FileIO

from harmonia.errors import PushRefusedError
from harmonia.nix import base32

_UNCLAIMED_MAX_AGE_S = 6 * 60 * 60  # Nix 2.35 sends all NARs of a closure before the first narinfo
_IMPORTED_MAX_AGE_S = 10 * 60  # a client that got 200 to HEAD for another path with the same NAR does not send it
_COUNT_INTERVAL_S = 5.0
_NEARLY_FULL = 0.9
_PART, _IMPORTED = ".part", ".imported"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Incoming:
    """A NAR file that is being received. Thread-safe. `close` removes it unless `keep` was called."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115 (`close` closes it)
        self._path = path
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()

    def write(self, data: bytes | bytearray) -> None:
        """Append bytes. Raises PushRefusedError if the disk is full."""
        with self._lock:
            if self._file.closed:
                return
            self._sha256.update(data)
            _write(self._file.fileno(), data)

    def keep(self, file_hash: str) -> None:
        """Move the complete file into the spool. Raises PushRefusedError unless its SHA-256 is `file_hash`."""
        with self._lock:
            _check_hash(file_hash, self._sha256.digest())
            os.rename(self._path, os.path.join(os.path.dirname(self._path), file_hash))

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
                self._file.close()


class Spool:
    """The spooled files in a directory."""

    def __init__(self, directory: str, max_bytes: int, max_file_bytes: int) -> None:
        """Create the directory. Raises OSError if it cannot be created or written to."""
        os.makedirs(directory, 0o700, exist_ok=True)
        os.close(os.open(os.path.join(directory, ".lock"), os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._used_bytes = 0
        self._counted_at = -math.inf
        self._lock = threading.Lock()
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def check_size(self, size: int) -> None:
        """Raise PushRefusedError if a file of `size` bytes is larger than one NAR may be."""
        if size > self._max_file_bytes:
            what = f"the NAR has {size} bytes, more than push.max_nar_size, {self._max_file_bytes}; raise the setting"
            raise PushRefusedError(413, what)

    def receive(self, size: int) -> Incoming:
        """Reserve space for a file of `size` bytes, and create it.

        Raises PushRefusedError if the file is too large, or the spool or the disk is full.
        """
        self.check_size(size)
        with self._exclusively():
            self._reserve(size)
            disk = os.statvfs(self._directory)
            if size > disk.f_bavail * disk.f_frsize:
                raise PushRefusedError(413, "the disk of the server's spool is full; free space there, then push again")
            try:
                descriptor, path = tempfile.mkstemp(_PART, dir=self._directory)
            except OSError as error:
                raise _full(error) from None
            incoming = Incoming(descriptor, path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, size)  # counts as used from now on
            except BaseException:
                incoming.close()
                raise
            return incoming

    def store(self, file_hash: str, data: bytes | bytearray) -> None:
        """Store a small file. Raises PushRefusedError like `receive` and `Incoming.keep`."""
        if self.store_at_once(file_hash, data):
            return
        with closing(self.receive(len(data))) as incoming:
            incoming.write(data)
            incoming.keep(file_hash)

    def store_at_once(self, file_hash: str, data: bytes | bytearray) -> bool:
        """Store a small file like `store`, without waiting for other threads or workers.

        Return False if that is impossible.
        """
        self.check_size(len(data))
        _check_hash(file_hash, hashlib.sha256(data).digest())
        return self._reserve_at_once(len(data)) and self._link(file_hash, data)

    def _link(self, file_hash: str, data: bytes | bytearray) -> bool:
        """Store a file that gets its name, and so remains, only when it is complete.

        Return False if that is impossible: not every file system has such files, and /proc may be missing. Or the file
        exists, and has to be replaced, because it may have lost its content in a crash of the machine.
        Raises PushRefusedError if the disk is full.
        """
        try:
            descriptor = os.open(self._directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            _write(descriptor, data)
            os.link(f"/proc/self/fd/{descriptor}", file_hash, dst_dir_fd=self._descriptor, follow_symlinks=True)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def has(self, file_hash: str) -> bool:
        """Return True if the file is in the spool."""
        return any(map(os.path.exists, self._paths(file_hash)))

    def renew(self, file_hash: str) -> None:
        """Restart the time for which a file waits in the spool."""
        for path in self._paths(file_hash):
            with suppress(FileNotFoundError):
                os.utime(path)

    def size(self, file_hash: str) -> int:
        """Return the size of the file, or 0 if it is not in the spool."""
        for path in self._paths(file_hash):
            with suppress(FileNotFoundError):
                return os.stat(path).st_size
        return 0

    def open(self, file_hash: str) -> FileIO | None:
        """Open the file. Returns None if it is not in the spool."""
        for path in self._paths(file_hash):
            with suppress(FileNotFoundError):
                return open(path, "rb", buffering=0)
        return None

    def remove_damaged(self, file_hash: str) -> None:
        """Remove the file if it does not have the hash that is its name, so that it can be sent again."""
        if (file := self.open(file_hash)) is None:
            return
        with file:
            actual = base32.encode(hashlib.file_digest(file, "sha256").digest())
        if actual != file_hash:
            for path in self._paths(file_hash):
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def mark_imported(self, file_hash: str) -> None:
        """Let the file be removed in ten minutes, or at once if its space is needed."""
        path, imported = self._paths(file_hash)
        with suppress(FileNotFoundError):
            os.utime(path)
            os.rename(path, imported)

    def sweep(self) -> None:
        """Remove files that have waited too long, and partial files of workers that died."""
        with self._exclusively():
            self._sweep(_IMPORTED_MAX_AGE_S)

    def _paths(self, file_hash: str) -> tuple[str, str]:
        """Return where a file is before and after its import."""
        path = os.path.join(self._directory, file_hash)
        return path, path + _IMPORTED

    def _sweep(self, imported_max_age: float) -> None:
        now = time.time()
        for entry in self._entries():
            with suppress(FileNotFoundError):
                age = now - entry.stat(follow_symlinks=False).st_mtime
                if entry.name.endswith(_PART):
                    _unlink_unlocked(entry.path)
                elif age >= (imported_max_age if entry.name.endswith(_IMPORTED) else _UNCLAIMED_MAX_AGE_S):
                    os.unlink(entry.path)

    def _reserve(self, size: int) -> None:
        """Count a file of `size` bytes. Raises PushRefusedError if there is no room for it.

        The files are counted every few seconds, and always if the spool is nearly full. Meanwhile, files of other
        workers are not counted.
        """
        if self._reserve_at_once(size):
            return
        self._count()
        if self._used_bytes + size > self._max_bytes:
            self._sweep(imported_max_age=0)
            self._count()
        if self._used_bytes + size > self._max_bytes:
            what = f"the spool is full: {self._used_bytes} of {self._max_bytes} bytes"
            raise PushRefusedError(413, f"{what}; push later, or raise push.spool_size")
        with self._lock:
            self._used_bytes += size

    def _reserve_at_once(self, size: int) -> bool:
        """Count a file of `size` bytes, and return True, if there is certainly room for it."""
        with self._lock:
            is_recent = time.monotonic() - self._counted_at < _COUNT_INTERVAL_S
            if not is_recent or self._used_bytes + size > self._max_bytes * _NEARLY_FULL:
                return False
            self._used_bytes += size
        return True

    def _count(self) -> None:
        used = 0
        for entry in self._entries():
            with suppress(FileNotFoundError):
                used += entry.stat(follow_symlinks=False).st_size
        with self._lock:
            self._used_bytes = used
            self._counted_at = time.monotonic()

    def _entries(self) -> list["os.DirEntry[str]"]:
        with os.scandir(self._directory) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Lock the spool, so that no other thread or worker reserves space or sweeps meanwhile."""
        with open(os.path.join(self._directory, ".lock"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _unlink_unlocked(path: str) -> None:
    """Remove the file of a worker that has died."""
    with open(path, "rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _write(descriptor: int, data: bytes | bytearray) -> None:
    """Write all of the data. Raises PushRefusedError if the disk is full."""
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise _full(error) from None


def _check_hash(file_hash: str, sha256: bytes) -> None:
    """Raise PushRefusedError unless a body has the hash that is its name."""
    actual = base32.encode(sha256)
    if actual != file_hash:
        what = f"the body has the SHA-256 {actual}, not the one in its URL; send the NAR again"
        raise PushRefusedError(400, what)


def _full(error: OSError) -> Exception:
    if error.errno in _FULL:
        return PushRefusedError(413, "the disk of the server's spool is full; free space there, then push again")
    return error
