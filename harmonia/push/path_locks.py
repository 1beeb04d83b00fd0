"""Locks of store paths, shared by all threads of all workers. The kernel releases the locks of a process that dies."""

import errno
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 0.05
_flock = struct.Struct("@hhqqi")  # l_type, l_whence, l_start, l_len, l_pid of fcntl(2)
_BUSY = {errno.EAGAIN, errno.EACCES}


class PathLocks:
    """Locks in one file: a byte for each path. Two paths that share a byte wait for each other."""

    def __init__(self, path: str) -> None:
        self._path = path

    @contextmanager
    def locked(self, store_path: str, check: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of a path. While waiting for it, call `check` repeatedly; an error of `check` ends the wait."""
        # Locks of open file descriptions also exclude other threads of this process (fcntl(2)).
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock = _flock.pack(fcntl.F_WRLCK, os.SEEK_SET, zlib.crc32(store_path.encode()), 1, 0)
            while True:
                try:
                    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
                    break
                except OSError as error:
                    if error.errno not in _BUSY:
                        raise
                check()
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)
