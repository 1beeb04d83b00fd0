"""Compressors for every compression that we accept."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable

import brotli
import zstandard

_LZMA1 = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 2}


def lzip(content: bytes, version: int = 1) -> bytes:
    raw = lzma.compress(content, lzma.FORMAT_RAW, filters=[_LZMA1])
    trailer = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(8, "little")
    size = 6 + len(raw) + 20
    return b"LZIP" + bytes((version, 16)) + raw + trailer + (size.to_bytes(8, "little") if version else b"")


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
