"""NAR as a zstd file without compression, with raw blocks (RFC 8878 section 3.1.1).

The length of the file is known from the length of the NAR, as HTTP/1.0 requires.
"""

import hashlib
import struct
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import xxhash

from harmonia.cache.nar_compressor import Compressor, NarSource
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_frames import check
from harmonia.errors import StoreObjectError
from harmonia.ownership import closed_on_error
from harmonia.store.file_reader import OpenSlice

_HEADER = struct.Struct("<IBBQ")
_MAGIC = 0xFD2FB528
_DESCRIPTOR = 0b11_0_0_0_1_00
"""Frame header descriptor: a content size of 8 bytes, a window descriptor, and a checksum at the end."""
_WINDOW = 7 << 3
"""Window descriptor for 128 KiB, the size of the largest block."""
BLOCK_BYTES = 128 * 1024
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4


def stored_size(size: int) -> int:
    """Return the length of the file for content of `size` bytes."""
    blocks = max(1, -(-size // BLOCK_BYTES))
    return _HEADER.size + blocks * _BLOCK_HEADER_BYTES + size + _CHECKSUM_BYTES


def store(chunks: Iterable[bytes | Future[Any]], size: int) -> Generator[bytes | Future[Any]]:
    """Yield the file for content of `size` bytes, in pieces. Yield each future in `chunks` for the caller to wait for.

    The last block follows the end of `chunks`, so that an error at the end leaves the file incomplete.
    Raises StoreObjectError if the chunks do not have `size` bytes.
    """
    writer = StoredWriter(size)
    yield writer.head
    for chunk in chunks:
        if isinstance(chunk, Future):
            yield chunk
        else:
            yield from writer.blocks(chunk)
    yield writer.end()


class StoredWriter:
    """The writer of the file for content of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.head = _HEADER.pack(_MAGIC, _DESCRIPTOR, _WINDOW, size)
        self._size = size
        self._received = 0
        self._checksum = xxhash.xxh64()
        self._block = bytearray()

    def blocks(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the blocks that the next chunk of the content completes, except the last of the file.

        Raises StoreObjectError if the content is longer than `size`.
        """
        self._checksum.update(chunk)
        self._received += len(chunk)
        if self._received > self._size:
            raise StoreObjectError(f"a NAR has at least {self._received} bytes instead of {self._size}")
        self._block += chunk
        while len(self._block) > BLOCK_BYTES:
            yield _block_header(BLOCK_BYTES) + self._block[:BLOCK_BYTES]
            del self._block[:BLOCK_BYTES]

    def end(self) -> bytes:
        """Return the last block and the checksum.

        Raises StoreObjectError if the content is shorter than `size`.
        """
        if self._received != self._size:
            raise StoreObjectError(f"a NAR has only {self._received} bytes instead of {self._size}")
        checksum = self._checksum.intdigest().to_bytes(8, "little")[:_CHECKSUM_BYTES]
        return _block_header(len(self._block), last=True) + self._block + checksum


def _block_header(size: int, *, last: bool = False) -> bytes:
    return (size << 3 | last).to_bytes(_BLOCK_HEADER_BYTES, "little")


class StoredNar:
    """The body of a zstd file without compression, whose length is known before the NAR is read. It has no ranges."""

    def __init__(self, compressor: Compressor, source: NarSource, encoding: Encoding) -> None:
        """Start to fill the cache with the compressed file for later requests. Blocks for a moment.

        Closing this body closes `source`.
        """
        self._compressor = compressor
        self._source = source
        self.size = stored_size(source.size)
        with closed_on_error(self):
            if (file := compressor.open_file(source, encoding)) is not None:
                file.close()

    def close(self) -> None:
        self._source.close()

    def read(self, start: int, stop: int | None) -> Generator[bytes | Future[Any]]:
        if start or stop not in {None, self.size}:
            raise NotImplementedError  # never asked for: without an ETag and not resumable
        try:
            yield from store(self._content(), self._source.size)
        except StoreObjectError as error:
            self._compressor.mark_damaged(self._source, error)
            raise
        self._compressor.mark_intact(self._source)

    def _content(self) -> Generator[bytes | Future[Any]]:
        """Yield the NAR in chunks.

        Raises StoreObjectError at the end if the NAR does not have its hash.
        """
        sha256 = hashlib.sha256()
        with closing(self._source.read(0, self._source.size)) as chunks:
            for chunk in chunks:
                if isinstance(chunk, Future):
                    yield chunk
                    continue
                for data in iter(chunk.read, b"") if isinstance(chunk, OpenSlice) else (chunk,):
                    sha256.update(data)
                    yield data
        check(self._source, sha256.digest())
