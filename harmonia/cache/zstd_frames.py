"""Split bodies into pieces and compress each into its own zstd frame, in one thread pool for all downloads."""

import hashlib
import mmap
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

from harmonia.cache.frame_index import FrameIndex
from harmonia.cache.zstd import Encoding, encoders, first_encoder, foreign_encoder
from harmonia.config.tables.zstd import Zstd
from harmonia.errors import StoreObjectError
from harmonia.nix import base32
from harmonia.store import file_reader
from harmonia.store.file_reader import ReadOnly, Step

_T = TypeVar("_T")
_P = ParamSpec("_P")

_PIECE_BYTES = 512 * 1024  # maximum of a piece of compressed data for the caller
_MAX_QUEUED_PER_THREAD = 16  # frames for each thread; beyond that, a NAR that may be sent uncompressed is


class Source(Protocol):
    """Content to compress. Several threads may read it at the same time. Its `str` is its path."""

    @property
    def size(self) -> int:
        """Return the length of the content in bytes."""

    @property
    def sha256(self) -> bytes | None:
        """Return the expected hash of a NAR, or None for other content. With another hash, the body is broken off."""

    def read(self, start: int, stop: int) -> Generator[Step]:
        """Yield the bytes from `start` to `stop`."""


@runtime_checkable
class Growing(Protocol):
    """A source that is not readable to its end yet."""

    def wait_covered(self, stop: int) -> Future[bytes] | None:
        """Return a future that completes when the bytes up to `stop` are readable, or None if they are now.

        The future also completes if the source has failed.
        """


class Frame(NamedTuple):
    """A compressed frame."""

    content: memoryview
    """The content, valid until the frame is released."""
    compressed: bytes
    buffer: mmap.mmap


class FrameEncoder:
    """The compressor of frames for all downloads, which take turns."""

    def __init__(self, settings: Zstd) -> None:
        self.encoding = Encoding.of(settings)
        self.seconds = 0.0
        """CPU time of compression so far."""
        self.threads, self._encoders = encoders(settings)
        self.foreign_encoder = foreign_encoder()
        self.first_encoder = first_encoder()
        self._waiting = 0
        self._buffers: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @property
    def saturated(self) -> bool:
        """True if so many frames wait that a NAR should be sent uncompressed, if its client accepts that."""
        return self._waiting > self.threads * _MAX_QUEUED_PER_THREAD

    @property
    def waiting(self) -> int:
        """Return the number of frames in compression or waiting for it."""
        return self._waiting

    def stream(
        self,
        source: Source,
        start: int,
        stop: int | None,
        encoding: Encoding | None = None,
        index: FrameIndex | None = None,
    ) -> Generator[bytes | Future[Any], None, int]:
        """Yield the compressed bytes from `start` to `stop` or to the end, without the cache. Return the end position.

        Yields a future to wait for before each frame. Frames before `start` are compressed, too, unless `index`
        has their sizes. Raises StoreObjectError if a frame differs from `index`, or if the content does not have its
        hash.
        """
        sha256 = hashlib.sha256()
        position = unpacked = 0
        # A slow client holds at most one frame in memory.
        encoding = encoding or self.encoding
        for number, offset in enumerate(encoding.offsets(source.size)):
            if index is not None and position + index.frames[number][0] <= start:
                position += index.frames[number][0]
                continue
            frame = self.submit(source, offset, encoding)
            try:
                yield frame
            finally:
                frame.cancel()
            result = frame.result()
            del frame  # and with it the buffer, once it is released
            sha256.update(result.content)
            unpacked += len(result.content)
            compressed = result.compressed
            self.release(result)
            del result
            if unpacked == source.size:
                check(source, sha256.digest())
            if index is not None:
                index.check(number, compressed)
            first = max(start - position, 0)
            last = len(compressed) if stop is None else min(stop - position, len(compressed))
            for piece in range(first, last, _PIECE_BYTES):
                yield compressed[piece : min(piece + _PIECE_BYTES, last)]
            position += len(compressed)
            if stop is not None and position >= stop:
                break
        return position

    def submit(self, source: Source, offset: int, encoding: Encoding) -> Future[Frame]:
        """Compress the frame that starts at `offset` in a thread, and return a future for it."""
        waiting = source.wait_covered(encoding.end(offset, source.size)) if isinstance(source, Growing) else None
        if waiting is None:
            return self._submit(source, offset, encoding)
        return chain(waiting, self._submit, source, offset, encoding)

    def _submit(self, source: Source, offset: int, encoding: Encoding) -> Future[Frame]:
        self._count(1)
        try:
            frame = self._threads_for(source, offset, encoding).submit(self._compress, source, offset, encoding)
        except RuntimeError:  # no thread can be started
            self._count(-1)
            raise
        frame.add_done_callback(lambda _: self._count(-1))
        return frame

    def _threads_for(self, source: Source, offset: int, encoding: Encoding) -> Executor:
        if offset == 0 and encoding.first_frame_size(source.size):
            return self.first_encoder
        return self._encoders if encoding == self.encoding else self.foreign_encoder

    def release(self, frame: Frame) -> None:
        """Reuse the memory of a frame's content for another frame.

        To get new memory from the kernel, page by page, takes longer than to read a file into it.
        """
        with self._lock:
            if self._waiting and len(frame.buffer) == self.encoding.frame_size:
                self._buffers.append(frame.buffer)

    def _count(self, difference: int) -> None:
        with self._lock:
            self._waiting += difference
            if not self._waiting:
                self._buffers.clear()

    def _buffer(self, size: int) -> mmap.mmap:
        with self._lock:
            if self._buffers and size == self.encoding.frame_size:
                return self._buffers.pop()
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def compress(self, content: bytes) -> bytes:
        """Compress content to a frame in our encoding, in this thread, and count the CPU time."""
        began = time.thread_time()
        compressed = self.encoding.compress(content)
        with self._lock:
            self.seconds += time.thread_time() - began
        return compressed

    def _compress(self, source: Source, offset: int, encoding: Encoding) -> Frame:
        began = time.thread_time()
        end = encoding.end(offset, source.size)
        buffer = self._buffer(encoding.frame_size)
        content = memoryview(buffer)[: end - offset]
        if not file_reader.read_into(content, source.read(offset, end)):
            raise StoreObjectError(f"{source}: it does not have its registered {source.size} bytes")
        frame = Frame(content, encoding.compress(content), buffer)
        with self._lock:
            self.seconds += time.thread_time() - began
        return frame


class Compressed(ReadOnly):
    """A body that is not a NAR, compressed while it is sent."""

    def __init__(self, encoder: FrameEncoder, source: Source) -> None:
        self._encoder = encoder
        self._source = source

    @property
    def size(self) -> None:
        return None

    def read(self, start: int, stop: int | None) -> Generator[bytes | Future[Any]]:
        yield from self._encoder.stream(self._source, start, stop)


def chain(first: Future[Any], submit: Callable[_P, Future[_T]], *args: _P.args, **named: _P.kwargs) -> Future[_T]:
    """Call `submit` when the future `first` completes, and return a future for the result. No thread waits."""
    both: Future[_T] = Future()

    def finish(second: Future[_T]) -> None:
        if (error := second.exception()) is not None:
            both.set_exception(error)
        else:
            both.set_result(second.result())

    def begin(_: Future[Any]) -> None:
        if both.set_running_or_notify_cancel():
            try:
                submit(*args, **named).add_done_callback(finish)
            except RuntimeError as error:  # no thread can be started
                both.set_exception(error)

    first.add_done_callback(begin)
    return both


def check(source: Source, sha256: bytes) -> None:
    """Raise StoreObjectError if `sha256`, the hash of the content, differs from the registered one."""
    if source.sha256 is not None and source.sha256 != sha256:
        actual, registered = map(base32.encode, (sha256, source.sha256))  # as in the names of NARs
        raise StoreObjectError(f"{source}: its NAR hash is sha256:{actual}, but sha256:{registered} was registered")
