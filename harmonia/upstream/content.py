"""Whether a downloaded NAR is what its narinfo said: by FileHash, and unpacked by NarHash, which is what keys sign."""

import bz2
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from harmonia.errors import UpstreamError
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo

_PIECE = 1 << 20  # bytes that are unpacked at once: a small file may hold a huge one
_ZSTD_INPUT = 1024  # likewise: a block of 128 KiB may come out of each four bytes
_MEMORY = 256 << 20  # bytes that the window of an xz or zstd file may take


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
        self._begun = False

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


class Check:
    """Looks at a download piece by piece. UpstreamError as soon as it cannot be what it should."""

    def __init__(self, info: PathInfo, nar: NarFile) -> None:
        self._info = info
        self._nar = nar
        self._file = hashlib.sha256() if nar.file_hash is not None else None
        self._content = hashlib.sha256()
        self._size = 0
        make = _UNPACKERS.get(nar.compression)
        self._unpacker = make() if make else None

    @property
    def conclusive(self) -> bool:
        """Whether it can tell. Without a FileHash, it has to be able to unpack."""
        return self._file is not None or self._unpacker is not None

    def feed(self, data: bytes) -> None:
        if self._file is not None:
            self._file.update(data)
        if self._unpacker is None:
            return
        try:
            for piece in self._unpacker.unpack(data):
                self._content.update(piece)
                self._size += len(piece)
                if self._size > self._info.nar_size:
                    raise UpstreamError("it unpacks to more than its NarSize")
        except (lzma.LZMAError, OSError, EOFError, zlib.error, zstandard.ZstdError):
            raise UpstreamError(f"it is no {self._nar.compression}") from None

    def finish(self) -> None:
        if self._file is not None and self._file.digest() != self._nar.file_hash:
            raise UpstreamError("it has another FileHash")
        if self._unpacker is not None:
            size, whole = self._size == self._info.nar_size, self._unpacker.whole
            if not (size and whole and self._content.digest() == self._info.nar_hash):
                raise UpstreamError("it has another NarHash")


def unpack(data: bytes, encoding: str, limit: int) -> bytes:
    """A small body as its Content-Encoding says. UpstreamError where it is more than `limit`, or cannot be unpacked."""
    make = _UNPACKERS.get({"": "none", "identity": "none", "x-gzip": "gzip"}.get(encoding, encoding))
    if make is None:
        raise UpstreamError(f"its Content-Encoding {encoding!r} is unknown")
    unpacker = make()
    unpacked = bytearray()
    try:
        for piece in unpacker.unpack(data):
            unpacked += piece
            if len(unpacked) > limit:
                raise UpstreamError("it is too large")
    except (lzma.LZMAError, OSError, EOFError, zlib.error, zstandard.ZstdError):
        raise UpstreamError(f"it is no {encoding}") from None
    if not unpacker.whole:
        raise UpstreamError("it is cut short")
    return bytes(unpacked)
