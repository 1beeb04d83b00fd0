"""Reader of the bytes of NAR segments from disk, in chunks."""

import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from math import inf
from time import perf_counter
from typing import Any

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import FileSlice, Segment
from harmonia.store import confined

CHUNK_BYTES = 256 * 1024
"""Length of a chunk: large enough to hide the cost of a thread switch, small enough for many downloads in memory."""

END = sys.maxsize
"""A position after the end of every body: a read from there yields no bytes, and ends when the size is known."""


class OpenSlice:
    """The bytes from `position` to `stop` of an open file. Each read advances `position`."""

    __slots__ = ("_descriptor", "position", "stop")

    def __init__(self, descriptor: int, position: int, stop: int) -> None:
        self._descriptor = descriptor
        self.position = position
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.position

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """Return the next bytes, at most `size`, or `b""` at the end of the slice or of a file that has shrunk."""
        data = os.pread(self._descriptor, min(size, len(self)), self.position)
        self.position += len(data)
        return data

    def read_into(self, buffer: memoryview) -> int:
        """Fill a buffer with the next bytes. Return their number, which is less than its length only at the end."""
        filled = 0
        while filled < len(buffer) and len(self):
            count = os.preadv(self._descriptor, [buffer[filled : filled + len(self)]], self.position)
            if not count:
                break
            self.position += count
            filled += count
        return filled

    def read_cached(self, size: int = CHUNK_BYTES) -> bytearray | None:
        """Return the next bytes like `read`, but only from the page cache. Return None if they are not there."""
        data = bytearray(min(size, len(self)))
        try:
            count = os.preadv(self._descriptor, [data], self.position, os.RWF_NOWAIT)
        except OSError:  # not in the page cache, or not supported by the file system; `read` raises all other errors
            return None
        if not count:  # the end; or in Linux 5.9 and 5.10, not in the page cache (preadv(2), BUGS)
            return None
        del data[count:]
        self.position += count
        return data


Chunk = bytes | OpenSlice
"""Bytes, or a part of an open file, to be read to its end before the next chunk is asked for."""
Step = Chunk | Future[Any]
"""A chunk, or a future that the reader waits for before it asks for the next step."""


class ReadOnly:
    """A body without resources to close. It opens and closes its file during a read."""

    __slots__ = ()

    def close(self) -> None:
        """Do nothing."""


def chunks(
    archive: Iterable[Segment | Future[bytes]], chunk_size: int = CHUNK_BYTES, max_seconds: float = inf
) -> Generator[Step]:
    """Yield the bytes of segments in chunks of less than twice `chunk_size`, and large files as open slices.

    A chunk of small files is shorter if it took `max_seconds` to read.
    Raises StoreObjectError if the length of a file has changed, and OSError if a file cannot be read.
    """
    parts: list[bytes] = []
    size = 0
    until = perf_counter() + max_seconds
    files = confined.Files()
    try:
        for segment in archive:
            if isinstance(segment, bytes):
                piece = segment
            elif isinstance(segment, Future) or len(segment) >= chunk_size:
                files.close()  # sockets.connection_limit allows one open file for each download
                if size:
                    yield _joined(parts)
                    size = 0
                if isinstance(segment, Future):
                    yield segment
                else:
                    yield from _large_file(segment)
                continue
            else:
                piece = _small_file(segment, files)
            parts.append(piece)
            size += len(piece)
            if size >= chunk_size or perf_counter() > until:
                files.close()  # the client may take long to ask for the next chunk
                del piece
                data = _joined(parts)
                while len(data) >= 2 * chunk_size:  # because of a single text that is longer than a chunk
                    yield data[:chunk_size]
                    data = data[chunk_size:]
                yield data
                del data  # free it before the next chunk is read
                size = 0
                until = perf_counter() + max_seconds
        files.close()
        if size:
            yield _joined(parts)
    finally:
        files.close()


def _joined(parts: list[bytes]) -> bytes:
    """Return the joined parts, and clear the list, so that a slow client does not keep both in memory."""
    data = b"".join(parts)
    parts.clear()
    return data


def flatten(chunks: Generator[Step], chunk_size: int = CHUNK_BYTES) -> Generator[bytes]:
    """Yield the bytes of chunks, those of open slices in pieces of at most `chunk_size`. Waits for futures."""
    with closing(chunks):  # closes its file at once; otherwise, the traceback of an error would keep the file open
        for chunk in chunks:
            if isinstance(chunk, OpenSlice):
                while data := chunk.read(chunk_size):
                    yield data
            elif isinstance(chunk, Future):
                chunk.result()
            else:
                yield chunk


def read_into(buffer: memoryview, chunks: Generator[Step]) -> bool:
    """Fill a buffer with the bytes of chunks. Return True if they have exactly its length. Waits for futures."""
    filled = 0
    with closing(chunks):
        for chunk in chunks:
            if isinstance(chunk, OpenSlice):
                filled += chunk.read_into(buffer[filled:])
            elif isinstance(chunk, Future):
                chunk.result()
            elif len(chunk) <= len(buffer) - filled:
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
            else:
                return False
    return filled == len(buffer)


def read(archive: Iterable[Segment | Future[bytes]], chunk_size: int = CHUNK_BYTES) -> Generator[bytes]:
    """Yield the bytes of segments in chunks of less than twice `chunk_size`. Waits for futures."""
    return flatten(chunks(archive, chunk_size), chunk_size)


# Read files instead of mapping them: if a mapped file shrinks, SIGBUS kills the process.
# Without O_NONBLOCK, to open a file that was replaced by a fifo blocks.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK


def _small_file(file: FileSlice, files: confined.Files) -> bytes:
    descriptor = files.open(file.path, _FLAGS)
    length = file.stop - file.start
    try:
        if length == file.size:
            contents = os.read(descriptor, length + 1)  # one byte more, to detect that the file has grown
            size = len(contents)
        else:
            contents = os.pread(descriptor, length, file.start)
            size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size != file.size or len(contents) != length:
        raise _changed(file)
    return contents


def _large_file(file: FileSlice) -> Iterator[OpenSlice]:
    descriptor = confined.open_file(file.path, _FLAGS)
    try:
        part = OpenSlice(descriptor, file.start, file.stop)
        yield part
        if len(part) or os.fstat(descriptor).st_size != file.size:
            raise _changed(file)
    finally:
        os.close(descriptor)


def _changed(file: FileSlice) -> StoreObjectError:
    return StoreObjectError(f"{os.fsdecode(file.path)} changed its length while it was read")
