"""A file that one process writes, its *filler*, while any number of others read what there is of it already.

Until it is whole it is *growing*. It ends with a digest of each block of its content and a trailer, by which every
reader sees when it is whole, so that no part of one ever passes for a whole::

    content
    XXH3-64 of each block of 256 KiB of the content
    SHA-256 of the content, its length in 8 bytes, XXH3-64 of these two, a magic number

Each read of a whole file checks the blocks that it touches: a byte that changes on the disk after the file was written
breaks the download. The digests detect faults, not forgers: whoever can write to the cache directory is trusted.

The filler holds a lock on the file, which the kernel takes from it when it dies. Nothing here waits for anybody.
"""

import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Generator
from contextlib import suppress

import xxhash

from harmonia.errors import CacheFileError
from harmonia.store.file_reader import CHUNK_BYTES, OpenSlice

GROWING = ".growing"
"""What its name ends in until it is whole."""
_TRAILER = struct.Struct("<40s8s16s")
_SUMMARY = struct.Struct("<32sQ")
_MAGIC = b"harmonia file v2"

BLOCK_BYTES = CHUNK_BYTES
_DIGEST_BYTES = 8
_DIGESTS_AT_ONCE = 1024
"""Digests that a slice has in memory: for 256 MiB of content."""


def content_size(file_size: int) -> int:
    """Return the size of the content if a file of `file_size` bytes is whole.

    In a growing file, that many bytes are surely content: digests and trailer, or parts of them, come after these.
    """
    rest = max(file_size - _TRAILER.size, 0)
    return max(rest - -(-rest // (BLOCK_BYTES + _DIGEST_BYTES)) * _DIGEST_BYTES, 0)


def _digests_size(size: int) -> int:
    return -(-size // BLOCK_BYTES) * _DIGEST_BYTES


class CachedFile:
    """A file of the cache, whole or growing. It can be read until it is closed, even when it was evicted."""

    def __init__(self, descriptor: int, damaged: Callable[["CachedFile"], None] | None = None) -> None:
        """`damaged` is called when a read finds that the content of the whole file has changed."""
        self._descriptor = descriptor
        self._damaged = damaged
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
        file_size = os.fstat(self._descriptor).st_size
        size = content_size(file_size)
        trailer = os.pread(self._descriptor, _TRAILER.size, size + _digests_size(size))
        if size + _digests_size(size) + len(trailer) == file_size and len(trailer) == _TRAILER.size:
            summary, digest, magic = _TRAILER.unpack(trailer)
            sha256, length = _SUMMARY.unpack(summary)
            if (length, digest, magic) == (size, xxhash.xxh3_64_digest(summary), _MAGIC):
                self.sha256 = sha256
        self.size = size

    def slice(self, start: int, stop: int) -> OpenSlice:
        """Return a part of the content. Its reads raise CacheFileError if the whole file has changed."""
        if not self.whole:
            return OpenSlice(self._descriptor, start, stop)
        return _VerifiedSlice(self._descriptor, start, stop, self.size, self._found_damaged)

    def _found_damaged(self) -> None:
        if self._damaged is not None:
            self._damaged(self)

    def follow(self, start: int, stop: int | None) -> Generator[OpenSlice | None, None, int]:
        """The bytes from `start` to `stop`, or to the end, as they come; None whenever there are none yet.

        Returns how far it came: not all the way where nobody fills it any longer. CacheFileError where it was cut
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
                raise CacheFileError("its file in the cache was cut short")
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

    def detach(self) -> int:
        """The descriptor, for somebody else to close."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self.detach())


class _VerifiedSlice(OpenSlice):
    """A part of a whole file, read block by block. Raises CacheFileError if a block does not have its digest."""

    __slots__ = ("_damaged", "_digests", "_first_digest", "_size")

    def __init__(self, descriptor: int, position: int, stop: int, size: int, damaged: Callable[[], None]) -> None:
        super().__init__(descriptor, position, stop)
        self._size = size
        self._damaged = damaged
        self._digests = b""
        self._first_digest = 0  # the block that the first of them belongs to

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """Read to the end of a block, so that the next read begins with one, or the whole slice if `size` allows it."""
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
        except OSError as error:  # a disk that notices the damage itself
            self._damaged()
            raise CacheFileError(f"cannot read its file in the cache: {error.strerror}") from error
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
        except OSError:  # as OpenSlice.read_cached: what is wrong, if anything is, `read` finds
            return None
        if count < length or len(digest) < _DIGEST_BYTES:
            return None
        return bytearray(self._verified(block, digest, size))

    def _block(self) -> tuple[int, int]:
        """Return where the block of the next byte begins, and how long it is."""
        start = self.position - self.position % BLOCK_BYTES
        return start, min(BLOCK_BYTES, self._size - start)

    def _digest(self, flags: int = 0) -> bytes:
        """Return the digest of the block of the next byte, as it stands in the file."""
        number = self.position // BLOCK_BYTES
        offset = (number - self._first_digest) * _DIGEST_BYTES
        if not 0 <= offset < len(self._digests):
            last = min(number + _DIGESTS_AT_ONCE, -(-self.stop // BLOCK_BYTES))
            digests = bytearray((last - number) * _DIGEST_BYTES)
            count = os.preadv(self._descriptor, [digests], self._size + number * _DIGEST_BYTES, flags)
            self._digests, self._first_digest, offset = bytes(digests[:count]), number, 0
        return self._digests[offset : offset + _DIGEST_BYTES]

    def _verified(self, block: bytes | bytearray, digest: bytes, size: int) -> bytes | bytearray:
        """Return the next bytes, which are in `block`, at most `size`."""
        if xxhash.xxh3_64_digest(block) != digest:
            self._damaged()
            raise CacheFileError("its file in the cache is damaged")
        start = self.position % BLOCK_BYTES
        stop = min(start + size, start + len(self), len(block))
        self.position += stop - start
        return block if (start, stop) == (0, len(block)) else block[start:stop]


class Filler:
    """The right to write a file, until `commit` or `abandon`, which may also follow an OSError of any other method.

    Whoever has it ends it by one of these, or all others would wait for its lock.
    """

    def __init__(
        self, path: str, descriptor: int, filled: Callable[[int], None], failed: Callable[[OSError], None]
    ) -> None:
        """`path` is its name once it is whole, which `filled` hears of with its size; `failed` hears of the disk."""
        self._path = path
        self._descriptor = descriptor
        self._filled = filled
        self._failed = failed
        self._sha256 = hashlib.sha256()
        self._block = xxhash.xxh3_64()
        self._digests = bytearray()
        self._finished = False
        self.size = 0

    @property
    def sha256(self) -> bytes:
        """Of what was written so far."""
        return self._sha256.digest()

    def append(self, data: bytes) -> None:
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
        """Of what was written so far."""
        return os.pread(self._descriptor, min(size, self.size - position), position)

    def finish(self) -> None:
        """Make the file whole, which those who read it already see at once. It is not in the cache yet."""
        if self.size % BLOCK_BYTES:
            self._end_block()
        summary = _SUMMARY.pack(self.sha256, self.size)
        self._write(self._digests + _TRAILER.pack(summary, xxhash.xxh3_64_digest(summary), _MAGIC))
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

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _write(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._failed(error)
            raise
