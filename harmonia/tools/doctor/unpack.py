"""Decompression of NARs held in memory."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import zstandard

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""Exceptions of the decompressors."""
_PIECE_BYTES = 1 << 18
_WINDOW_BYTES = 1 << 27  # the largest window that every Nix can decompress


def _pieces(body: bytes) -> Iterator[bytes]:
    return (body[start : start + _PIECE_BYTES] for start in range(0, len(body), _PIECE_BYTES))


class _Unpacker(Protocol):
    """Common interface of the decompressors in the standard library and in zstandard."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _unpack(make: Callable[[], _Unpacker], body: bytes) -> Iterator[bytes]:
    """Yield the content of concatenated frames, streams or members. Raises EOFError if the last one is truncated."""
    position = 0
    while position < len(body):
        unpacker = make()
        while not unpacker.eof:
            piece = body[position : position + _PIECE_BYTES]
            if not piece:
                raise EOFError("it ends early")
            position += len(piece)
            yield unpacker.decompress(piece)
        position -= len(unpacker.unused_data)


UNPACK: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {
    "none": _pieces,
    "zstd": partial(_unpack, lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()),
    "gzip": partial(_unpack, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)),
    "xz": partial(_unpack, lzma.LZMADecompressor),
    "bzip2": partial(_unpack, bz2.BZ2Decompressor),
}
