"""File that one process, its *filler*, writes while any number of others read the part that exists.

Until the file is complete (*whole*), it is *growing*. It ends with a digest of each block of its content and a trailer.
By the trailer, every reader sees that the file is complete, so a part cannot be mistaken for the complete file::

    content
    XXH3-64 of each block of 256 KiB of the content
    SHA-256 of the content, its length in 8 bytes, XXH3-64 of these two, a magic number

A *bare* file has only the content, so that other programs can send it. Its digests and its trailer are in a second file
beside it, which exists before the first has its final name.

Each read of a complete file verifies the blocks that it touches: if a byte has changed on the disk after the file was
written, the download breaks off. The digests detect faults of the disk, but no forgery: users who can write to the
cache directory are trusted.

The filler holds a lock on the file, which the kernel releases when the process dies. No function waits for another
process.
"""

import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Generator, Hashable
from contextlib import suppress
from typing import Protocol

import xxhash

from harmonia.errors import CacheFileError
from harmonia.store.file_reader import CHUNK_BYTES, OpenSlice

GROWING = ".growing"
"""The suffix of the name of a growing file."""
SUMS = ".sums"
"""The suffix of the name of the file with the digests and the trailer of a bare file."""
_TRAILER = struct.Struct("<40s8s16s")
_SUMMARY = struct.Struct("<32sQ")
_MAGIC = b"harmonia file v2"

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW

BLOCK_BYTES = CHUNK_BYTES
_DIGEST_BYTES = 8
_DIGESTS_AT_ONCE = 1024
"""Number of digests that a slice holds in memory, those of 256 MiB of content."""


def content_size(file_size: int) -> int:
    """Return the length of the content of a complete file of `file_size` bytes.

    In a growing file, at least this many bytes are content; the rest may be digests and a trailer.
    """
    rest = max(file_size - _TRAILER.size, 0)
    return max(rest - -(-rest // (BLOCK_BYTES + _DIGEST_BYTES)) * _DIGEST_BYTES, 0)


def _digests_size(size: int) -> int:
    return -(-size // BLOCK_BYTES) * _DIGEST_BYTES


def _trailer(sha256: bytes, size: int) -> bytes:
    summary = _SUMMARY.pack(sha256, size)
    return _TRAILER.pack(summary, xxhash.xxh3_64_digest(summary), _MAGIC)


def _sha256_in_trailer(descriptor: int, digests_start: int, size: int) -> bytes | None:
    """Return the SHA-256 in the trailer after the digests of a content of `size` bytes, or None without a trailer."""
    trailer = os.pread(descriptor, _TRAILER.size, digests_start + _digests_size(size))
    if len(trailer) == _TRAILER.size:
        summary, digest, magic = _TRAILER.unpack(trailer)
        sha256, length = _SUMMARY.unpack(summary)
        if (length, digest, magic) == (size, xxhash.xxh3_64_digest(summary), _MAGIC):
            return bytes(sha256)
    return None


def ending(content: bytes, sha256: bytes) -> bytes:
    """Return the digests and the trailer of a complete file with this content."""
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
    return b"".join(map(xxhash.xxh3_64_digest, blocks)) + _trailer(sha256, len(content))


class Watcher(Protocol):
    """Receives what reads of a complete file find. Its functions must return quickly."""

    def discard(self, file: "CachedFile") -> None:
        """Remove a file whose content changed after it was written."""

    def mark_intact(self, file: "CachedFile") -> None:
        """Remember that a file was read from its first byte to its last, and each block had its digest."""

    def is_intact(self, file: "CachedFile") -> bool:
        """Return True if `mark_intact` was called for a file a short time ago."""


class CachedFile:
    """A file of the cache, complete or growing. It can be read until it is closed, even if it was evicted."""

    def __init__(self, descriptor: int, path: str | None = None, watcher: "Watcher | None" = None) -> None:
        """Read from `descriptor`. `path` is the path of the complete file, beside which its digests may be.

        `watcher` is told what reads of the complete file find.
        """
        self._descriptor = descriptor
        self.path = path
        self._watcher = watcher
        self._sums_descriptor: int | None = None
        """Of the file with the digests, if this file is complete and bare."""
        self.size = 0
        """The number of bytes of content at the last `refresh`."""
        self.sha256: bytes | None = None
        """The SHA-256 of the content, or None while the file is growing."""

    @property
    def whole(self) -> bool:
        """Return True if the file was complete at the last `refresh`."""
        return self.sha256 is not None

    def refresh(self) -> None:
        """Update `size` and `sha256` from the file."""
        if self.whole:
            return
        file_size = os.fstat(self._descriptor).st_size
        size = content_size(file_size)
        if size + _digests_size(size) + _TRAILER.size == file_size:
            self.sha256 = _sha256_in_trailer(self._descriptor, size, size)
        if self.sha256 is None and (sums := self._open_sums()) is not None:
            self.sha256 = _sha256_in_trailer(sums, 0, file_size)
            if self.sha256 is None:  # of an earlier file
                self._close_sums()
            else:
                size = file_size
        self.size = size

    @property
    def sendable_name(self) -> str | None:
        """Return the name of the file, if it has only the content, and if all of it was verified a short time ago.

        Return None for a file that does not have its name yet, or was evicted.
        """
        if self._sums_descriptor is None or self.path is None:
            return None
        if self._watcher is None or not self._watcher.is_intact(self):
            return None
        with suppress(FileNotFoundError):
            if self.is_at(self.path):
                return os.path.basename(self.path)
        return None

    def identity(self) -> Hashable:
        """Return a value that no later file has, even one with the same content, or None if this file is not bare.

        The inode number alone may be that of a later file, too. The file with the digests does not change, so that its
        time is that of its creation, while the times of the content change whenever it is used.
        """
        if self._sums_descriptor is None:
            return None
        sums = os.fstat(self._sums_descriptor)
        return os.fstat(self._descriptor).st_ino, sums.st_ino, sums.st_ctime_ns, self.sha256

    def _open_sums(self) -> int | None:
        """Open the file with the digests. Return its descriptor, or None if it does not exist."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                self._sums_descriptor = os.open(self.path + SUMS, READ_FLAGS)
        return self._sums_descriptor

    def _close_sums(self) -> None:
        descriptor, self._sums_descriptor = self._sums_descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def slice(self, start: int, stop: int) -> OpenSlice:
        """Return a part of the content. Its reads raise CacheFileError if a complete file is damaged."""
        if not self.whole:
            return OpenSlice(self._descriptor, start, stop)
        digests = (self._descriptor, self.size) if self._sums_descriptor is None else (self._sums_descriptor, 0)
        return _VerifiedSlice(self._descriptor, start, stop, self.size, digests, self._found_damaged)

    def content(self) -> bytes:
        """Return the whole content of a small file. Raises CacheFileError if it is damaged."""
        return b"".join(iter(self.slice(0, self.size).read, b""))

    def _found_damaged(self) -> None:
        if self._watcher is not None:
            self._watcher.discard(self)

    def follow(self, start: int, stop: int | None) -> Generator[OpenSlice | None, None, int]:
        """Yield the bytes from `start` to `stop` or to the end as they are written. Yield None if there are none yet.

        Returns the end position, which is before `stop` if no process fills the file any more.
        Raises CacheFileError if a complete file was cut short.
        """
        position = start
        self.refresh()
        verifies_all = start == 0 and self._sums_descriptor is not None  # other programs can send only such a file
        while True:
            self.refresh()
            end = self.size if stop is None else min(stop, self.size)
            if position < end:
                part = self.slice(position, end)
                yield part
                position = part.position
            if self.whole and position < end:
                raise CacheFileError("the file in the cache was cut short")
            if verifies_all and position == self.size and self._watcher is not None:
                self._watcher.mark_intact(self)
            if self.whole or position == stop:
                return position
            if not self.lock():
                yield None
                continue
            self.refresh()  # the filler may have completed the file just before it released the lock
            if not self.whole:
                return position  # even if there are more bytes, because another process may need the lock

    def lock(self) -> bool:
        """Try to take the writer lock. Return True if no other process is writing.

        Then no other process can start to write until this file is closed.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: str) -> bool:
        """Return True if `path` is still the path of this file. It stays so while the file is locked.

        Raises OSError if `path` does not exist.
        """
        return os.path.samestat(os.fstat(self._descriptor), os.stat(path))

    def empty(self) -> None:
        """Remove the content of a file that is open for writing."""
        if os.fstat(self._descriptor).st_size:  # without this check, ext4 would flush an empty file at each close
            os.ftruncate(self._descriptor, 0)

    def detach(self) -> int:
        """Return the descriptor, which the caller then closes."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close the file. This also releases its lock."""
        self._close_sums()
        if self._descriptor >= 0:
            os.close(self.detach())


class _VerifiedSlice(OpenSlice):
    """A part of a complete file, read block by block. Reads raise CacheFileError if a digest of a block is wrong."""

    __slots__ = ("_damaged", "_digests", "_digests_at", "_first_digest", "_size")

    def __init__(
        self,
        descriptor: int,
        position: int,
        stop: int,
        size: int,
        digests_at: tuple[int, int],
        damaged: Callable[[], None],
    ) -> None:
        """`digests_at` is the descriptor of the file with the digests, and the offset of the first."""
        super().__init__(descriptor, position, stop)
        self._size = size
        self._digests_at = digests_at
        self._damaged = damaged
        self._digests = b""
        self._first_digest = 0  # the number of the block of the first digest

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """Read to the end of a block, so that the next read starts at a block, or the full slice if `size` allows."""
        if len(self) > size:
            return self._read_block(size)
        data = b""
        while len(self):
            data += self._read_block(size)
        return data

    def _read_block(self, size: int) -> bytes:
        start, length = self._block()
        try:
            digest, block = self._digest(), os.pread(self._descriptor, length, start)
        except OSError as error:  # the disk itself has detected the damage
            self._damaged()
            raise CacheFileError(f"cannot read the file in the cache: {error.strerror}") from error
        return bytes(self._verified(block, digest, size))

    def read_into(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and (data := self.read(len(buffer) - filled)):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def read_cached(self, size: int = BLOCK_BYTES) -> bytearray | None:
        if not len(self):
            return None
        start, length = self._block()
        block = bytearray(length)
        try:
            digest = self._digest(os.RWF_NOWAIT)
            count = os.preadv(self._descriptor, [block], start, os.RWF_NOWAIT)
        except OSError:  # `read` finds the cause, as in OpenSlice.read_cached
            return None
        if count < length or len(digest) < _DIGEST_BYTES:
            return None
        return bytearray(self._verified(block, digest, size))

    def _block(self) -> tuple[int, int]:
        """Return the offset and the length of the block with the next byte."""
        start = self.position - self.position % BLOCK_BYTES
        return start, min(BLOCK_BYTES, self._size - start)

    def _digest(self, flags: int = 0) -> bytes:
        """Return the digest in the file for the block with the next byte."""
        number = self.position // BLOCK_BYTES
        offset = (number - self._first_digest) * _DIGEST_BYTES
        if not 0 <= offset < len(self._digests):
            last = min(number + _DIGESTS_AT_ONCE, -(-self.stop // BLOCK_BYTES))
            digests = bytearray((last - number) * _DIGEST_BYTES)
            descriptor, first = self._digests_at
            count = os.preadv(descriptor, [digests], first + number * _DIGEST_BYTES, flags)
            self._digests, self._first_digest, offset = bytes(digests[:count]), number, 0
        return self._digests[offset : offset + _DIGEST_BYTES]

    def _verified(self, block: bytes | bytearray, digest: bytes, size: int) -> bytes | bytearray:
        """Return the next bytes, at most `size`, which are in `block`.

        Raises CacheFileError if the block does not have its digest.
        """
        if xxhash.xxh3_64_digest(block) != digest:
            self._damaged()
            raise CacheFileError("the file in the cache is damaged")
        start = self.position % BLOCK_BYTES
        stop = min(start + size, start + len(self), len(block))
        self.position += stop - start
        return block if (start, stop) == (0, len(block)) else block[start:stop]


class Filler:
    """The writer of a growing file, until `commit` or `abandon`, which may also follow an OSError of any other method.

    The owner must call one of these, otherwise all other processes wait for the lock.
    """

    def __init__(
        self,
        path: str,
        growing: str,
        descriptor: int,
        on_filled: Callable[[int], None],
        on_failed: Callable[[OSError], None],
        *,
        bare: bool = False,
    ) -> None:
        """Write to `descriptor`, the file at `growing`. The path of the complete file is `path`.

        A `bare` file can be read by all users that can enter its directory.

        `on_filled` is called with the size of the complete file, `on_failed` with an error of the disk.
        """
        self._path = path
        self._growing = growing
        self._descriptor = descriptor
        self._on_filled = on_filled
        self._on_failed = on_failed
        self._bare = bare
        self._sha256 = hashlib.sha256()
        self._block = xxhash.xxh3_64()
        self._digests = bytearray()
        self._finished = False
        self.size = 0

    @property
    def sha256(self) -> bytes:
        """Return the SHA-256 of the content so far."""
        return self._sha256.digest()

    def append(self, data: bytes) -> None:
        """Append to the content.

        Raises OSError if the disk fails.
        """
        self._write(data)
        self._sha256.update(data)
        rest = memoryview(data)
        while rest:
            part = rest[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._block.update(part)
            self.size += len(part)
            rest = rest[len(part) :]
            if self.size % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._digests += self._block.digest()
        self._block.reset()

    def read(self, position: int, size: int) -> bytes:
        """Return at most `size` bytes at `position` of the content so far."""
        return os.pread(self._descriptor, min(size, self.size - position), position)

    def finish(self) -> None:
        """Write digests and trailer, so that current readers see the complete file. It is not in the cache yet.

        Raises OSError if the disk fails.
        """
        if self.size % BLOCK_BYTES:
            self._end_block()
        sums = self._digests + _trailer(self.sha256, self.size)
        if self._bare:
            self._write_sums(sums)
        else:
            self._write(sums)
        self._finished = True

    def _write_sums(self, sums: bytes | bytearray) -> None:
        """Write the file with the digests, or replace that of an earlier file or of another filler of the same content.

        Raises OSError if the disk fails.
        """
        unfinished = f"{self._path}-{threading.get_native_id()}{SUMS}"
        try:
            with open(unfinished, "xb") as file:
                file.write(sums)
                file.flush()
                os.fdatasync(file.fileno())
            os.rename(unfinished, self._path + SUMS)
            os.fchmod(self._descriptor, 0o644)
        except OSError as error:
            with suppress(OSError):
                os.unlink(unfinished)
            self._on_failed(error)
            raise

    def commit(self) -> None:
        """Add the complete file to the cache, and flush it to the disk.

        Raises OSError if the disk fails.
        """
        if not self._finished:
            self.finish()
        try:
            os.fdatasync(self._descriptor)
            os.rename(self._growing, self._path)
        except OSError as error:
            self._on_failed(error)
            raise
        self._close()
        self._on_filled(self.size)

    def withdraw(self) -> None:
        """Discard wrong content. The file becomes empty for its readers, too."""
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        self.abandon()

    def abandon(self) -> None:
        """Remove the growing file and release its lock, unless the file was committed or abandoned before."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            os.unlink(self._growing)
        if self._bare and self._finished:
            with suppress(OSError):
                os.unlink(self._path + SUMS)
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _write(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._on_failed(error)
            raise
