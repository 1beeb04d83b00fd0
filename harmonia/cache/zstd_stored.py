"""A zstd file with raw blocks: its length follows from the length of its content (RFC 8878 section 3.1.1)."""

import struct
from collections.abc import Generator, Iterable
from concurrent.futures import Future

import xxhash

from harmonia.errors import StoreObjectError

_HEADER = struct.Struct("<IBBQ")
_MAGIC = 0xFD2FB528
_DESCRIPTOR = 0b11_0_0_0_1_00
"""The content size takes 8 bytes, a window follows, a checksum ends the frame."""
_WINDOW = 7 << 3
"""128 KiB, which is the largest block, too."""
BLOCK_BYTES = 128 * 1024
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4


def stored_size(size: int) -> int:
    """Return the length of the file for content of `size` bytes."""
    blocks = max(1, -(-size // BLOCK_BYTES))
    return _HEADER.size + blocks * _BLOCK_HEADER_BYTES + size + _CHECKSUM_BYTES


def store(chunks: Iterable[bytes | Future[bytes]], size: int) -> Generator[bytes | Future[bytes]]:
    """Return the file for content of `size` bytes, in pieces. A future stands for a wait, and is passed on.

    The last block comes when `chunks` have ended: an error at their end leaves the file incomplete. Raises
    StoreObjectError if they are not `size` bytes.
    """
    checksum = xxhash.xxh64()
    found = 0
    block = bytearray()
    yield _HEADER.pack(_MAGIC, _DESCRIPTOR, _WINDOW, size)
    for chunk in chunks:
        if isinstance(chunk, Future):
            yield chunk
            continue
        checksum.update(chunk)
        found += len(chunk)
        block += chunk
        while len(block) > BLOCK_BYTES and found <= size:
            yield _block_header(BLOCK_BYTES) + block[:BLOCK_BYTES]
            del block[:BLOCK_BYTES]
        if found > size:
            break
    if found != size:
        raise StoreObjectError(f"a NAR has {'at least' if found > size else 'only'} {found} bytes instead of {size}")
    yield _block_header(len(block), last=True) + block + checksum.intdigest().to_bytes(8, "little")[:_CHECKSUM_BYTES]


def _block_header(size: int, *, last: bool = False) -> bytes:
    return (size << 3 | last).to_bytes(_BLOCK_HEADER_BYTES, "little")
