"""Compressors for every compression that we accept, and a check of our decompressors."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import brotli
import zstandard

from harmonia.nix.decompress import Decompressor

_LZMA1 = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 2}


def lzip(content: bytes, version: int = 1) -> bytes:
    raw = lzma.compress(content, lzma.FORMAT_RAW, filters=[_LZMA1])
    trailer = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(8, "little")
    size = 6 + len(raw) + 20
    return b"LZIP" + bytes((version, 16)) + raw + trailer + (size.to_bytes(8, "little") if version else b"")


def deflate(content: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(content) + stream.flush()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "br": brotli.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "lzip": lzip,
}


def unpacked(inner: Decompressor | None, data: bytes, cuts: Sequence[int] = ()) -> bytes | None:
    """Return the content of the data, fed in pieces that end at `cuts`, or None if the data is incomplete."""
    assert inner is not None
    places = sorted({min(cut, len(data)) for cut in cuts})
    content = b"".join(
        piece for start, stop in pairwise([0, *places, len(data)]) for piece in inner.feed(data[start:stop])
    )
    return content if inner.whole else None
