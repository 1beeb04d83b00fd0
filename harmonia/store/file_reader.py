"""Reader of the bytes that the segments of a NAR stand for, in chunks."""

import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import FileSlice, Segment
from harmonia.store import confined

CHUNK_BYTES = 256 * 1024
"""Bytes: so many that a thread hop per chunk is lost in the noise, so few that each download can hold some."""

END = sys.maxsize
"""A position beyond the end of any body: a read from there yields no bytes, and ends when the size is known."""


class OpenSlice:
    """The bytes from `position` to `stop` of an open file, of which each read takes the next."""

    __slots__ = ("_descriptor", "position", "stop")

    def __init__(self, descriptor: int, position: int, stop: int) -> None:
        self._descriptor = descriptor
        self.position = position
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.position

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """At most `size` bytes, none at the end: that of the slice, or of a file that has become shorter."""
        data = os.pread(self._descriptor, min(size, len(self)), self.position)
        self.position += len(data)
        return data

    def read_into(self, buffer: memoryview) -> int:
        """Fill a buffer with the next bytes. Returns how many they are: less than its length only at the end."""
        filled = 0
        while filled < len(buffer) and len(self):
            count = os.preadv(self._descriptor, [buffer[filled : filled + len(self)]], self.position)
            if not count:
                break
            self.position += count
            filled += count
        return filled

    def read_cached(self, size: int = CHUNK_BYTES) -> bytearray | None:
        """The same, as far as it needs no disk. None where it does, or where nobody can tell."""
        data = bytearray(min(size, len(self)))
        try:
            count = os.preadv(self._descriptor, [data], self.position, os.RWF_NOWAIT)
        except OSError:  # BlockingIOError, or a file system that knows no such reads; what else there is, `read` tells
            return None
        if not count:  # the end, or a Linux 5.9 or 5.10 that has nothing of it in memory (preadv(2), BUGS)
            return None
        del data[count:]
        self.position += count
        return data


Chunk = bytes | OpenSlice
"""Bytes, or a part of an open file, to be read to its end before the next chunk is asked for."""
Step = Chunk | Future[Any]
"""A chunk, or a future that ends when there is more to read. Whoever reads waits for it in his own way."""


class ReadOnly:
    """A body that has nothing open but while it is read."""

    __slots__ = ()

    def close(self) -> None:
        pass


def chunks(archive: Iterable[Segment | Future[bytes]], chunk_size: int = CHUNK_BYTES) -> Generator[Step]:
    """The bytes of a run of segments, in chunks of less than twice `chunk_size`, and what files have of no less.

    StoreObjectError where a file is no longer as long as its slice says; OSError where it cannot be read.
    """
    parts: list[bytes] = []
    size = 0
    files = confined.Files()
    try:
        for segment in archive:
            if isinstance(segment, bytes):
                piece = segment
            elif isinstance(segment, Future) or len(segment) >= chunk_size:
                files.close()  # a download has one file open while it waits for its client (sockets.connection_limit)
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
            if size >= chunk_size:
                files.close()  # it may take long until the next is wanted
                del piece
                data = _joined(parts)
                while len(data) >= 2 * chunk_size:  # a single text is longer than a chunk
                    yield data[:chunk_size]
                    data = data[chunk_size:]
                yield data
                del data  # while the next is read
                size = 0
        files.close()
        if size:
            yield _joined(parts)
    finally:
        files.close()


def _joined(parts: list[bytes]) -> bytes:
    """Return the parts as one, and empty the list: a client that reads slowly is not to hold them twice."""
    data = b"".join(parts)
    parts.clear()
    return data


def flatten(chunks: Generator[Step], chunk_size: int = CHUNK_BYTES) -> Generator[bytes]:
    """Chunks with what open slices stand for, at most `chunk_size` of it at a time. Blocks for a future."""
    with closing(chunks):  # and its file at once, not when the last who has an error has forgotten it
        for chunk in chunks:
            if isinstance(chunk, OpenSlice):
                while data := chunk.read(chunk_size):
                    yield data
            elif isinstance(chunk, Future):
                chunk.result()
            else:
                yield chunk


def read_into(buffer: memoryview, chunks: Generator[Step]) -> bool:
    """Fill a buffer with what chunks are and stand for. Whether they come to its length, and to no more.

    Blocks for a future.
    """
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
    """The bytes of a run of segments, in chunks of less than twice `chunk_size`."""
    return flatten(chunks(archive, chunk_size), chunk_size)


# Plain reads, no mapping: a file that shrinks under a mapping kills the process.
# O_NONBLOCK, or the opening of what has become a fifo waits for its writer.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK


def _small_file(file: FileSlice, files: confined.Files) -> bytes:
    descriptor = files.open(file.path, _FLAGS)
    length = file.stop - file.start
    try:
        if length == file.size:
            contents = os.read(descriptor, length + 1)  # one more, to see that there is no more
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
