"""Decompressors for NARs: every valid file of each format, in pieces, in bounded memory.

In most formats, a file may have several streams (members, frames) and padding. After the last stream of gzip, bzip2,
lzip and lzma, other bytes are ignored, because libarchive, which decompresses for Nix, ignores them.
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import brotli
import zstandard

from harmonia.errors import FormatError

MEMORY_BYTES = 128 << 20
"""Maximum memory for the window of an xz, lzma, lzip or zstd file. Nix's libzstd and xz's presets need no more."""
LARGE_MEMORY_BYTES = (1536 << 20) + MEMORY_BYTES
"""Memory that xz needs with its largest dictionary. Allow this to one decompressor at a time."""
DEFLATE = "deflate"
"""A compression of HTTP bodies that Nix does not use for NARs."""
_READ_BYTES = 256 * 1024
_PIECE_BYTES = 1 << 20  # maximum of a piece of output
_INPUT_BYTES = 4096  # the rest of the input is copied for each stream that ends in it
_ZSTD_INPUT_BYTES = 1024  # four bytes can decompress to a block of 128 KiB
_XZ_ALIGNMENT = 4  # streams are padded with zeros to a multiple of this, in bytes


class WindowError(FormatError):
    """A file needs more memory than is allowed. The caller may retry with LARGE_MEMORY_BYTES."""


class Decompressor(Protocol):
    """The decompressor of one file."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the output for the next bytes of the file. Pieces may be empty."""

    @property
    def whole(self) -> bool:
        """True if the input so far is a complete file."""


class _Stream(Protocol):
    """The decompressor of one stream of the file."""

    eof: bool
    unused_data: bytes
    """The input after the end of the stream."""

    def pieces(self, data: bytes) -> Iterator[bytes]: ...


class _Plain:
    whole = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data


class _Stepwise:
    """A stream of xz, bzip2 or lzma."""

    def __init__(self, stream: lzma.LZMADecompressor | bz2.BZ2Decompressor) -> None:
        self._stream = stream
        self.eof = False
        self.unused_data = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._stream.decompress(data, _PIECE_BYTES)
        while not self._stream.eof and not self._stream.needs_input:
            yield self._stream.decompress(b"", _PIECE_BYTES)
        self.eof, self.unused_data = self._stream.eof, self._stream.unused_data


class _Zlib:
    """A stream of gzip or zlib, or of raw deflate, depending on zlib's `wbits`."""

    def __init__(self, wbits: int) -> None:
        self._stream = zlib.decompressobj(wbits)
        self.eof = False
        self.unused_data = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            yield self._stream.decompress(data, _PIECE_BYTES)
            data = b"" if self._stream.eof else self._stream.unconsumed_tail
        self.eof, self.unused_data = self._stream.eof, self._stream.unused_data


class _Deflate:
    """The content coding `deflate`: zlib (RFC 9110 section 8.4.1.2), or raw deflate, which many servers send."""

    def __init__(self) -> None:
        self._stream = _Zlib(zlib.MAX_WBITS)
        self._head: bytes | None = b""
        """The input before the first output, to read again if it is not zlib. None after the first output."""
        self.eof = False
        self.unused_data = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        if self._head is not None:
            self._head += data
        try:
            for piece in self._stream.pieces(data):
                if piece:
                    self._head = None
                yield piece
        except zlib.error:
            if self._head is None:
                raise
            self._stream, data, self._head = _Zlib(-zlib.MAX_WBITS), self._head, None
            yield from self._stream.pieces(data)
        self.eof, self.unused_data = self._stream.eof, self._stream.unused_data


class _Zstd:
    """A zstd frame, which may be a skippable frame."""

    def __init__(self, zstd: zstandard.ZstdDecompressor) -> None:
        """Start a frame. All frames of a file share `zstd`, because to make one takes longer than a small frame."""
        self._frame = zstd.decompressobj()
        self.eof = False
        self.unused_data = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._frame.decompress(data)
        self.eof, self.unused_data = self._frame.eof, self._frame.unused_data


class _Brotli:
    unused_data = b""

    def __init__(self) -> None:
        self._stream = brotli.Decompressor()
        self.eof = False

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._stream.process(data, output_buffer_limit=_PIECE_BYTES)
        while not self._stream.is_finished() and (piece := self._stream.process(b"", output_buffer_limit=_PIECE_BYTES)):
            yield piece
        self.eof = self._stream.is_finished()


class _Lzip:
    """An lzip member: a head, a raw LZMA stream with an end marker, and a trailer with sizes and a checksum."""

    _HEAD_BYTES = 6
    _TRAILERS = (struct.Struct("<IQ"), struct.Struct("<IQQ"))  # in versions 0 and 1
    _DICTIONARY_BITS = range(12, 30)

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._held = b""
        self._stream: _Stepwise | None = None
        self._trailer = self._TRAILERS[0]
        self._crc32 = 0
        self._size = 0
        self._taken = 0  # bytes of input
        self.eof = False
        self.unused_data = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        self._taken += len(data)
        if self._stream is None:
            self._held += data
            if len(self._held) < self._HEAD_BYTES:
                return
            self._stream, data, self._held = self._begin(self._held), self._held[self._HEAD_BYTES :], b""
        if not self._stream.eof:
            for piece in self._stream.pieces(data):
                self._crc32 = zlib.crc32(piece, self._crc32)
                self._size += len(piece)
                yield piece
            data = self._stream.unused_data
        if self._stream.eof:
            self._held += data
            if len(self._held) >= self._trailer.size:
                self._end()

    def _end(self) -> None:
        self.eof, self.unused_data = True, self._held[self._trailer.size :]
        trailer = self._trailer.unpack_from(self._held)
        if trailer != (self._crc32, self._size, self._taken - len(self.unused_data))[: len(trailer)]:
            raise FormatError("the trailer of an lzip member has another checksum or size than its data")

    def _begin(self, head: bytes) -> _Stepwise:
        bits = head[5] & 0x1F
        if head[:4] != b"LZIP" or head[4] >= len(self._TRAILERS) or bits not in self._DICTIONARY_BITS:
            raise FormatError("not an lzip member")
        self._trailer = self._TRAILERS[head[4]]
        size = (1 << bits) - (1 << bits) // 16 * (head[5] >> 5)
        if size > self._memory:
            raise WindowError("the dictionary of an lzip member is too large")
        lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": 3, "lp": 0, "pb": 2}
        return _Stepwise(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[lzma1]))


class _OneStream:
    """A file of one stream. Bytes after the stream are ignored."""

    def __init__(self, begin: Callable[[], _Stream], input_bytes: int = _INPUT_BYTES) -> None:
        self._begin = begin
        self._input_bytes = input_bytes
        self._stream = begin()

    @property
    def whole(self) -> bool:
        return self._stream.eof

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), self._input_bytes):
            part = data[start : start + self._input_bytes]
            while part:
                if self._stream.eof and not (part := self._begin_next(part)):
                    break
                yield from self._stream.pieces(part)
                part = self._stream.unused_data if self._stream.eof else b""

    def _begin_next(self, data: bytes) -> bytes:  # noqa: ARG002 (for subclasses)
        """Start the next stream, and return the input for it. Return `b""` if no stream starts here."""
        return b""


class _Members(_OneStream):
    """A file of streams that each begin with `magic`. Other bytes after a stream are ignored."""

    def __init__(self, begin: Callable[[], _Stream], magic: bytes) -> None:
        super().__init__(begin)
        self._magic = magic
        self._held: bytes | None = b""
        """The first bytes after a stream if they can begin another one, or None if they cannot."""

    def _begin_next(self, data: bytes) -> bytes:
        if self._held is None:
            return b""
        held = self._held + data
        if held.startswith(self._magic):
            self._stream, self._held = self._begin(), b""
            return held
        self._held = held if self._magic.startswith(held) else None
        return b""


class _Frames(_OneStream):
    """A file that consists of streams only. Each may be padded with zeros to a multiple of `alignment` bytes."""

    def __init__(
        self, begin: Callable[[], _Stream], input_bytes: int = _INPUT_BYTES, alignment: int | None = None
    ) -> None:
        super().__init__(begin, input_bytes)
        self._alignment = alignment
        self._zeros = 0

    @property
    def whole(self) -> bool:
        return self._stream.eof and self._zeros % (self._alignment or 1) == 0

    def _begin_next(self, data: bytes) -> bytes:
        rest = data.lstrip(b"\0") if self._alignment else data
        self._zeros += len(data) - len(rest)
        if rest:
            if not self.whole:
                raise FormatError("the length of the padding is not a multiple of four bytes")
            self._stream, self._zeros = self._begin(), 0
        return rest


def _zstd() -> _Frames:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MEMORY_BYTES)
    return _Frames(lambda: _Zstd(decompressor), _ZSTD_INPUT_BYTES)


def _xz(form: int, memory: int) -> _Stepwise:
    return _Stepwise(lzma.LZMADecompressor(form, memory))


_FORMATS: dict[str, Callable[[int], Decompressor]] = {
    "none": lambda _: _Plain(),
    "xz": lambda memory: _Frames(lambda: _xz(lzma.FORMAT_XZ, memory), alignment=_XZ_ALIGNMENT),
    "bzip2": lambda _: _Members(lambda: _Stepwise(bz2.BZ2Decompressor()), b"BZh"),
    "gzip": lambda _: _Members(lambda: _Zlib(16 + zlib.MAX_WBITS), b"\x1f\x8b\x08"),
    "zstd": lambda _: _zstd(),
    "br": lambda _: _OneStream(_Brotli),
    "lzma": lambda memory: _OneStream(lambda: _xz(lzma.FORMAT_ALONE, memory)),
    "lzip": lambda memory: _Members(lambda: _Lzip(memory), b"LZIP"),
    DEFLATE: lambda _: _OneStream(_Deflate),
}
COMPRESSIONS = frozenset(_FORMATS) - {DEFLATE}
"""The supported values of a narinfo's `Compression`. Nix's others are rare, and some need an external program."""


class _WithFormatErrors:
    """A decompressor that turns all errors of its library into FormatErrors."""

    def __init__(self, name: str, inner: Decompressor) -> None:
        self._name = name
        self._inner = inner

    @property
    def whole(self) -> bool:
        return self._inner.whole

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            yield from self._inner.feed(data)
        except lzma.LZMAError as error:
            if "limit" in str(error):  # Python does not distinguish this error in another way
                raise WindowError(f"a window of this {self._name} file is too large") from None
            raise FormatError(f"not {self._name} data") from None
        except (OSError, EOFError, zlib.error, zstandard.ZstdError, brotli.error):
            raise FormatError(f"not {self._name} data") from None


def decompressor(compression: str, memory: int = MEMORY_BYTES) -> Decompressor:
    """Return a decompressor for a file with this compression, one of COMPRESSIONS or DEFLATE.

    It raises WindowError if the file needs more than `memory` bytes for its window, if it is xz, lzma or lzip.
    """
    return _WithFormatErrors(compression, _FORMATS[compression](memory))


def unpack_file(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """Yield the output for a file with this compression, one of COMPRESSIONS, in pieces of about 1 MiB at most.

    Raises FormatError if the file is malformed. A zstd file may be truncated: compare the length of the output.
    """
    if compression == "zstd":  # reads as much as the output needs; `decompressor` has to take tiny steps
        zstd = zstandard.ZstdDecompressor(max_window_size=MEMORY_BYTES)
        with zstd.stream_reader(file, read_across_frames=True, closefd=False) as reader:
            try:
                while piece := reader.read(_READ_BYTES):
                    yield piece
            except zstandard.ZstdError:
                raise FormatError("not zstd data") from None
        return
    unpacking = decompressor(compression)
    while data := file.read(_READ_BYTES):
        yield from unpacking.feed(data)
    if not unpacking.whole:
        raise FormatError("the file is truncated")
