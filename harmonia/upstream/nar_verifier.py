"""Whether a downloaded NAR is what its narinfo said: by FileHash, and unpacked by NarHash, which is what keys sign."""

import bz2
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import zstandard

from harmonia.errors import UpstreamError
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo

_PIECE = 1 << 20  # bytes that are unpacked at once: a small file may hold a huge one
_SMALL_INPUT = 4096  # bytes of a small body at once: the rest of it is copied for each stream that ends in it
_ZSTD_INPUT = 1024  # likewise: a block of 128 KiB may come out of each four bytes
_MEMORY = 128 << 20  # bytes that the window of an xz or zstd file may take: the most that libzstd takes for Nix


class _Unpacker(Protocol):
    def unpack(self, data: bytes) -> Iterator[bytes]: ...
    @property
    def whole(self) -> bool: ...


class _Plain:
    whole = True

    def unpack(self, data: bytes) -> Iterator[bytes]:
        yield data


class _Stepwise:
    """xz and bzip2, of one stream or several."""

    def __init__(self, make: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]) -> None:
        self._make = make
        self._stream = make()

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._stream.eof:
                self._stream = self._make()
            yield self._stream.decompress(data, _PIECE)
            while not self._stream.eof and not self._stream.needs_input:
                yield self._stream.decompress(b"", _PIECE)
            data = self._stream.unused_data if self._stream.eof else b""

    @property
    def whole(self) -> bool:
        return self._stream.eof


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    def unpack(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._stream.eof:
                self._stream = zlib.decompressobj(wbits=31)
            yield self._stream.decompress(data, _PIECE)
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    @property
    def whole(self) -> bool:
        return self._stream.eof


class _Zstd:
    """Of any number of frames."""

    def __init__(self) -> None:
        self._make = zstandard.ZstdDecompressor(max_window_size=_MEMORY).decompressobj
        self._frame = self._make()

    def unpack(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_INPUT):
            part = data[start : start + _ZSTD_INPUT]
            while part:
                if self._frame.eof:
                    self._frame = self._make()
                yield self._frame.decompress(part)
                part = self._frame.unused_data

    @property
    def whole(self) -> bool:
        return self._frame.eof


_UNPACKERS: dict[str, Callable[[], _Unpacker]] = {
    "none": _Plain,
    "xz": lambda: _Stepwise(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)),
    "bzip2": lambda: _Stepwise(bz2.BZ2Decompressor),
    "gzip": _Gzip,
    "zstd": _Zstd,
}


def conclusive(nar: NarFile) -> bool:
    """Whether it can be told what is right. Without a FileHash, we have to be able to unpack."""
    return nar.file_hash is not None or nar.compression in _UNPACKERS


def has_hash(nar: NarFile) -> bool:
    """Whether the hash of the file alone tells."""
    return nar.file_hash is not None or nar.compression == "none"


def check_file(info: PathInfo, nar: NarFile, sha256: bytes, size: int) -> None:
    """Look at the hash and the size of a file. UpstreamError where they are not as the narinfo says."""
    if nar.file_hash not in {None, sha256}:
        raise UpstreamError("it has another FileHash")
    if nar.compression == "none" and (sha256, size) != (info.nar_hash, info.nar_size):
        raise UpstreamError("it has another NarHash")


def check_content(info: PathInfo, nar: NarFile, file: Iterable[bytes]) -> None:
    """Unpack a file, if we can. UpstreamError where its content is not as the narinfo says."""
    make = _UNPACKERS.get(nar.compression)
    if make is None:
        return
    unpacker = make()
    sha256 = hashlib.sha256()
    size = 0
    for data in file:
        for piece in _unpacked(unpacker, data, nar.compression):
            sha256.update(piece)
            size += len(piece)
            if size > info.nar_size:
                raise UpstreamError("it unpacks to more than its NarSize")
    if not unpacker.whole or (sha256.digest(), size) != (info.nar_hash, info.nar_size):
        raise UpstreamError("it has another NarHash")


def unpack(data: bytes, encoding: str, limit: int) -> bytes:
    """A small body as its Content-Encoding says. UpstreamError where it is more than `limit`, or cannot be unpacked."""
    make = _UNPACKERS.get({"": "none", "identity": "none", "x-gzip": "gzip"}.get(encoding, encoding))
    if make is None:
        raise UpstreamError(f"its Content-Encoding {encoding!r} is unknown")
    unpacker = make()
    unpacked = bytearray()
    for start in range(0, len(data), _SMALL_INPUT):
        for piece in _unpacked(unpacker, data[start : start + _SMALL_INPUT], encoding):
            unpacked += piece
            if len(unpacked) > limit:
                raise UpstreamError("it is too large")
    if not unpacker.whole:
        raise UpstreamError("it is cut short")
    return bytes(unpacked)


def _unpacked(unpacker: _Unpacker, data: bytes, compression: str) -> Iterator[bytes]:
    try:
        yield from unpacker.unpack(data)
    except (lzma.LZMAError, OSError, EOFError, zlib.error, zstandard.ZstdError):
        raise UpstreamError(f"it is no {compression}") from None
