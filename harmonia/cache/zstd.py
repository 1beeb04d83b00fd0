"""zstd as we use it: a body is cut into pieces, and each becomes a frame of its own (RFC 8878 section 3.1).

So the same bytes come out however many threads take part; a large NAR keeps all cores busy; many downloads take turns,
frame by frame; and what is in memory follows from the number of threads alone. The price is that no repetition is found
beyond its frame: docs/explanation/benchmarks.md tells how much that is.
"""

import os
import re
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import zstandard

from harmonia.config.settings import Zstd
from harmonia.untrusted import integer

_MIN_FRAME_LOG = 23
"""8 MiB: the largest window that every decoder of the content encoding has (RFC 9659)."""
_LDM_WINDOW_LOG = 25  # 32 MiB: long-distance matches are worth their name from here on
_FIRST_FRAME_BYTES = 64 << 10
"""A first frame as small as that is there at once at any level. It makes files at most 0.3 % larger."""
_ONE_FRAME_BYTES = 1 << 20
"""Content up to here is one frame: its file would be 1 % larger, and it is there soon enough."""
_MAX_FOREIGN_WINDOW_LOG = 25
"""32 MiB: the frames of another server's encoding are no larger than that, unless ours are."""
_MIN_LEVEL = -7
_MAX_THREADS = 8
_FIRST_FRAME_THREADS = 2
_STREAM_LEVEL = 3
_NICENESS = 10  # so that a busy machine still answers at once

_LIBRARY = ".".join(map(str, zstandard.ZSTD_VERSION))

STREAM = f"zstd-{_LIBRARY}-{_STREAM_LEVEL}-stream"
"""What tells the bytes of `stream` from any others."""

_NAME = re.compile(
    r"zstd-(?P<library>[0-9]{1,3}(?:\.[0-9]{1,3}){2})-"
    r"(?P<sign>-?)(?P<level>[0-9]{1,2})-(?P<window_log>[0-9]{1,2})(?P<ldm>-ldm)?(?P<quick>-quick)?"
)

_thread = threading.local()  # a compressor is for one thread at a time


@dataclass(frozen=True, slots=True)
class Encoding:
    """All that decides which bytes come out."""

    level: int
    window_log: int
    """0 is what the level brings."""
    long_distance_matching: bool
    library: str = _LIBRARY
    """The version of libzstd: each may choose other bytes."""
    quick: bool = True
    """Whether large content begins with a small frame, for which a client waits less. Older URLs name files without."""

    @classmethod
    def of(cls, settings: Zstd) -> "Encoding":
        automatic = _LDM_WINDOW_LOG if settings.long_distance_matching else 0
        return cls(settings.level, settings.window_log or automatic, settings.long_distance_matching)

    @classmethod
    def parse(cls, name: str) -> "Encoding | None":
        """Return the encoding of that name, or None if no encoding has it."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        level, window_log = (integer(match[group], 99) or 0 for group in ("level", "window_log"))
        if match["sign"]:
            level = -level
        encoding = cls(level, window_log, bool(match["ldm"]), match["library"], bool(match["quick"]))
        return encoding if encoding.name == name else None  # each has one name alone

    @property
    def name(self) -> str:
        """A name that differs for everything that makes other bytes. It is part of URLs."""
        ldm, quick = "-ldm" * self.long_distance_matching, "-quick" * self.quick
        return f"zstd-{self.library}-{self.level}-{self.window_log}{ldm}{quick}"

    def can_make(self, other: "Encoding") -> bool:
        """Return whether a server of this encoding makes the bytes of another one, in bounded memory."""
        largest = max(_MAX_FOREIGN_WINDOW_LOG, self.window_log)
        return (
            other.library == _LIBRARY
            and _MIN_LEVEL <= other.level <= zstandard.MAX_COMPRESSION_LEVEL
            and (other.window_log == 0 or zstandard.WINDOWLOG_MIN <= other.window_log <= largest)
        )

    @property
    def frame_size(self) -> int:
        """How many bytes go into a frame at most."""
        return 1 << max(self.window_log, _MIN_FRAME_LOG)

    def offsets(self, size: int) -> Iterator[int]:
        """Yield where the frames of so many bytes begin. There is always one."""
        yield 0
        if first := self.first_frame_size(size):
            yield first
        yield from range(self.frame_size, size, self.frame_size)

    def end(self, offset: int, size: int) -> int:
        """Return where the frame ends that begins at `offset`, of so many bytes in all."""
        first = self.first_frame_size(size)
        return first if offset < first else min(offset - offset % self.frame_size + self.frame_size, size)

    def first_frame_size(self, size: int) -> int:
        """Return how many bytes go into the first frame if it is a small one, or else 0."""
        return _FIRST_FRAME_BYTES if self.quick and size > _ONE_FRAME_BYTES else 0

    def compress(self, data: bytes | memoryview) -> bytes:
        """One frame. It tells its length, and has a checksum."""
        compressor = getattr(_thread, "compressor", None)
        if compressor is None or _thread.encoding != self:
            window = {"window_log": self.window_log} if self.window_log else {}  # a 0 would not be the level's own
            parameters = zstandard.ZstdCompressionParameters.from_level(
                self.level, enable_ldm=self.long_distance_matching, write_checksum=True, **window
            )
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            _thread.compressor, _thread.encoding = compressor, self
        frame: bytes = compressor.compress(data)
        return frame


def stream(chunks: Iterable[bytes | None]) -> Generator[bytes | None]:
    """The chunks as one frame, of which a piece is there after each, for what comes bit by bit and nobody waits for."""
    compressor = zstandard.ZstdCompressor(level=_STREAM_LEVEL, write_checksum=True).compressobj()
    for chunk in chunks:
        yield chunk and compressor.compress(chunk) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    yield compressor.flush()


def encoders(settings: Zstd) -> tuple[int, ThreadPoolExecutor]:
    """The threads that compress, for all downloads together, and how many they are."""
    most = settings.max_ldm_encoders_per_worker if settings.long_distance_matching else 0
    threads = min(len(os.sched_getaffinity(0)), most or _MAX_THREADS, _MAX_THREADS)
    return threads, ThreadPoolExecutor(threads, thread_name_prefix="zstd", initializer=step_back)


def foreign_encoder() -> ThreadPoolExecutor:
    """Return the one thread for encodings of other servers, which may cost far more than ours."""
    return ThreadPoolExecutor(1, thread_name_prefix="zstd-foreign", initializer=step_back)


def first_encoder() -> ThreadPoolExecutor:
    """Return the threads for small first frames, for which clients wait. They do not step back."""
    return ThreadPoolExecutor(_FIRST_FRAME_THREADS, thread_name_prefix="zstd-first")


def step_back() -> None:
    """Raise the niceness of the calling thread, so that other threads run first."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a service's system call filter may forbid it
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
