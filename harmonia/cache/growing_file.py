"""A file that one process writes, its *filler*, while any number of others read what there is of it already.

Until it is whole it is *growing*. It ends with a trailer, by which every reader sees when it is whole, so that no part
of one ever passes for a whole::

    content, its SHA-256, its length in 8 bytes, a magic number

The filler holds a lock on the file, which the kernel takes from it when it dies. Nothing here waits for anybody.
"""

import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Generator
from contextlib import suppress

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import OpenSlice

GROWING = ".growing"
"""What its name ends in until it is whole."""
_TRAILER = struct.Struct("<32sQ16s")
_MAGIC = b"harmonia file v1"


class CachedFile:
    """A file of the cache, whole or growing. It can be read until it is closed, even when it was evicted."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = 0
        """How many bytes of the content there are."""
        self.sha256: bytes | None = None
        """Of the content, once it is whole."""

    @property
    def whole(self) -> bool:
        return self.sha256 is not None

    def refresh(self) -> None:
        """Look how far it has come."""
        if self.whole:
            return
        # What may be a trailer, or the beginning of one, is held back.
        size = max(os.fstat(self._descriptor).st_size - _TRAILER.size, 0)
        trailer = os.pread(self._descriptor, _TRAILER.size, size)
        if len(trailer) == _TRAILER.size:
            sha256, length, magic = _TRAILER.unpack(trailer)
            if (length, magic) == (size, _MAGIC):
                self.sha256 = sha256
        self.size = size

    def slice(self, start: int, stop: int) -> OpenSlice:
        return OpenSlice(self._descriptor, start, stop)

    def follow(self, start: int, stop: int | None) -> Generator[OpenSlice | None, None, int]:
        """The bytes from `start` to `stop`, or to the end, as they come; None whenever there are none yet.

        Returns how far it came: not all the way where nobody fills it any longer. StoreObjectError where it was cut
        short.
        """
        position = start
        while True:
            self.refresh()
            end = self.size if stop is None else min(stop, self.size)
            if position < end:
                part = self.slice(position, end)
                yield part
                position = part.position
            if self.whole and position < end:
                raise StoreObjectError("its file in the cache was cut short")
            if self.whole or position == stop:
                return position
            if not self.lock():
                yield None
                continue
            self.refresh()  # it may have become whole just before
            if not self.whole:
                return position  # also where there is more: who wants the lock must not wait until that is taken

    def lock(self) -> bool:
        """Whether nobody fills it, and nobody will before it is closed."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: str) -> bool:
        """Whether it is still the file there, as it remains while it is locked. OSError where nothing is there."""
        return os.path.samestat(os.fstat(self._descriptor), os.stat(path))

    def is_intact(self) -> bool:
        """Whether the content of a whole file is what was once written. Reads all of it."""
        sha256 = hashlib.sha256()
        content = self.slice(0, self.size)
        with suppress(OSError):  # a disk that notices by itself
            while data := content.read():
                sha256.update(data)
        return sha256.digest() == self.sha256

    def detach(self) -> int:
        """The descriptor, for somebody else to close."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self.detach())

    __del__ = close  # of one that nobody came to read


class Filler:
    """The right to write a file, until `commit`, or `abandon`: that one also after any other has raised OSError."""

    def __init__(
        self, path: str, descriptor: int, filled: Callable[[int], None], failed: Callable[[OSError], None]
    ) -> None:
        """`path` is its name once it is whole, which `filled` hears of with its size; `failed` hears of the disk."""
        self._path = path
        self._descriptor = descriptor
        self._filled = filled
        self._failed = failed
        self._sha256 = hashlib.sha256()
        self._finished = False
        self.size = 0

    @property
    def sha256(self) -> bytes:
        """Of what was written so far."""
        return self._sha256.digest()

    def append(self, data: bytes) -> None:
        self._write(data)
        self._sha256.update(data)
        self.size += len(data)

    def read(self, position: int, size: int) -> bytes:
        """Of what was written so far."""
        return os.pread(self._descriptor, min(size, self.size - position), position)

    def finish(self) -> None:
        """Make the file whole, which those who read it already see at once. It is not in the cache yet."""
        self._write(_TRAILER.pack(self.sha256, self.size, _MAGIC))
        self._finished = True

    def commit(self) -> None:
        """Add the whole file to the cache, and wait until it would outlast a crash."""
        if not self._finished:
            self.finish()
        try:
            os.fdatasync(self._descriptor)
            os.rename(self._path + GROWING, self._path)
        except OSError as error:
            self._failed(error)
            raise
        self._close()
        self._filled(self.size)

    def withdraw(self) -> None:
        """Take back what was written, which is wrong, from its readers, too: for them it becomes empty."""
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        self.abandon()

    def abandon(self) -> None:
        if self._descriptor < 0:
            return  # it is committed, or abandoned already
        with suppress(OSError):
            os.unlink(self._path + GROWING)
        self._close()

    __del__ = abandon  # of one that nobody came to use: its lock would make all others wait for ever

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._failed(error)
            raise
