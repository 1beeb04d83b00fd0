"""zstd encoding: a body is split into pieces, and each piece is compressed to a frame (RFC 8878 section 3.1).

The result does not depend on the number of threads. A large NAR uses all cores, and many downloads take turns, frame by
frame. Memory use depends only on the number of threads. But no match extends beyond its frame, so files are larger:
docs/explanation/benchmarks.md has the figures.
"""

import os
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import zstandard

from harmonia.config.tables.zstd import Zstd
from harmonia.process.threads import lower_priority
from harmonia.untrusted import integer

_MIN_FRAME_LOG = 23
"""8 MiB, the largest window that all decoders of the content coding support (RFC 9659)."""
_LDM_WINDOW_LOG = 25  # 32 MiB, from which on long-distance matching has an effect
_FIRST_FRAME_BYTES = 64 << 10
"""Length of a small first frame. It is compressed at once at any level, and makes files at most 0.3 % larger."""
_ONE_FRAME_BYTES = 1 << 20
"""Maximum length of content without a small first frame, which would make the file 1 % larger for little speed."""
_MAX_FOREIGN_WINDOW_LOG = 25
"""32 MiB, the maximum window of another server's encoding, unless our own window is larger."""
_MIN_LEVEL = -7
_MAX_THREADS = 8
_FIRST_FRAME_THREADS = 2
_STREAM_LEVEL = 3

_LIBRARY = ".".join(map(str, zstandard.ZSTD_VERSION))

STREAM = f"zstd-{_LIBRARY}-{_STREAM_LEVEL}-stream"
"""Name of the encoding of `stream`, for ETags. Other bytes have other names."""

_NAME = re.compile(
    r"zstd-(?P<library>[0-9]{1,3}(?:\.[0-9]{1,3}){2})-"
    r"(?P<sign>-?)(?P<level>[0-9]{1,2})-(?P<window_log>[0-9]{1,2})(?P<ldm>-ldm)?(?P<quick>-quick)?"
)

_thread = threading.local()  # has a compressor, which is not thread-safe


@dataclass(frozen=True)
class Encoding:
    """All parameters on which the compressed bytes depend."""

    level: int
    window_log: int
    """log2 of the window in bytes; 0 is the default of the level."""
    long_distance_matching: bool
    library: str = _LIBRARY
    """The version of libzstd. Versions may compress to different bytes."""
    quick: bool = True
    """True if large content starts with a small frame, so that a client gets the first bytes sooner.

    False for files with URLs from older versions of Harmonia.
    """

    @classmethod
    def of(cls, settings: Zstd) -> "Encoding":
        """Return the encoding of the settings."""
        automatic = _LDM_WINDOW_LOG if settings.long_distance_matching else 0
        return cls(settings.level, settings.window_log or automatic, settings.long_distance_matching)

    @classmethod
    def parse(cls, name: str) -> "Encoding | None":
        """Return the encoding with this name, or None if there is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        level, window_log = (integer(match[group], 99) or 0 for group in ("level", "window_log"))
        if match["sign"]:
            level = -level
        encoding = cls(level, window_log, bool(match["ldm"]), match["library"], bool(match["quick"]))
        return encoding if encoding.name == name else None  # refuse other spellings

    @cached_property
    def name(self) -> str:
        """Return the name, which is different for each encoding. URLs contain it."""
        ldm, quick = "-ldm" * self.long_distance_matching, "-quick" * self.quick
        return f"zstd-{self.library}-{self.level}-{self.window_log}{ldm}{quick}"

    def can_make(self, other: "Encoding") -> bool:
        """Return True if a server with this encoding can also compress with another one, in bounded memory."""
        largest = max(_MAX_FOREIGN_WINDOW_LOG, self.window_log)
        return (
            other.library == _LIBRARY
            and _MIN_LEVEL <= other.level <= zstandard.MAX_COMPRESSION_LEVEL
            and (other.window_log == 0 or zstandard.WINDOWLOG_MIN <= other.window_log <= largest)
        )

    @property
    def frame_size(self) -> int:
        """Return the maximum length of a frame's content in bytes."""
        return 1 << max(self.window_log, _MIN_FRAME_LOG)

    def offsets(self, size: int) -> Iterator[int]:
        """Yield the offsets of the frames in content of `size` bytes. There is at least one frame."""
        yield 0
        if first := self.first_frame_size(size):
            yield first
        yield from range(self.frame_size, size, self.frame_size)

    def end(self, offset: int, size: int) -> int:
        """Return the end of the frame that starts at `offset`, in content of `size` bytes."""
        first = self.first_frame_size(size)
        return first if offset < first else min(offset - offset % self.frame_size + self.frame_size, size)

    def first_frame_size(self, size: int) -> int:
        """Return the length of the small first frame of content of `size` bytes, or 0 if there is none."""
        return _FIRST_FRAME_BYTES if self.quick and size > _ONE_FRAME_BYTES else 0

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return one frame, with the length of its content and a checksum."""
        compressor = getattr(_thread, "compressor", None)
        if compressor is None or _thread.encoding != self:
            window = (
                {"window_log": self.window_log} if self.window_log else {}
            )  # libzstd does not treat 0 as the default here
            parameters = zstandard.ZstdCompressionParameters.from_level(
                self.level, enable_ldm=self.long_distance_matching, write_checksum=True, **window
            )
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            _thread.compressor, _thread.encoding = compressor, self
        frame: bytes = compressor.compress(data)
        return frame


def stream(chunks: Iterable[bytes]) -> Generator[bytes]:
    """Yield the chunks as one frame, a block after each chunk. For bodies that arrive slowly, in small chunks."""
    compressor = zstandard.ZstdCompressor(level=_STREAM_LEVEL, write_checksum=True).compressobj()
    for chunk in chunks:
        yield chunk and compressor.compress(chunk) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    yield compressor.flush()


async def stream_async(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """Yield the chunks like `stream`. Compresses on the event loop: for chunks that are compressed in a millisecond."""
    compressor = zstandard.ZstdCompressor(level=_STREAM_LEVEL, write_checksum=True).compressobj()
    async for chunk in chunks:
        yield compressor.compress(chunk) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    yield compressor.flush()


class Packer:
    """Compresses text that arrives in pieces into one frame in memory."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the text."""
        self._compressor = zstandard.ZstdCompressor(level=_STREAM_LEVEL, write_checksum=True).compressobj()
        self._packed = bytearray()

    def add(self, text: bytes) -> None:
        self.size += len(text)
        self._packed += self._compressor.compress(text)

    def finish(self) -> bytes:
        """Return the frame. Call it once."""
        return bytes(self._packed) + self._compressor.flush()


def encoders(settings: Zstd) -> tuple[int, ThreadPoolExecutor]:
    """Return the number of threads for compression, and their pool for all downloads."""
    most = settings.max_ldm_encoders_per_worker if settings.long_distance_matching else 0
    threads = min(len(os.sched_getaffinity(0)), most or _MAX_THREADS, _MAX_THREADS)
    return threads, ThreadPoolExecutor(threads, thread_name_prefix="zstd", initializer=lower_priority)


def foreign_encoder() -> ThreadPoolExecutor:
    """Return the one thread for encodings of other servers, which may cost far more than ours."""
    return ThreadPoolExecutor(1, thread_name_prefix="zstd-foreign", initializer=lower_priority)


def first_encoder() -> ThreadPoolExecutor:
    """Return the threads for small first frames, for which clients wait. They have the normal priority."""
    return ThreadPoolExecutor(_FIRST_FRAME_THREADS, thread_name_prefix="zstd-first")
