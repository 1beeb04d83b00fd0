"""NAR, the archive format of store objects (Nix `src/libutil/archive.cc`), as a lazy run of segments.

A segment is `bytes` that are known, or a `FileSlice` that stands for bytes not read yet. Both have a length and can be
sliced, and that is all that sizes, byte ranges and streaming need: no file is opened before its bytes are wanted.

The grammar, where each word, name and data is its length in 8 bytes, its bytes, and zeros up to a multiple of 8::

    archive   = "nix-archive-1" node
    node      = "(" "type" (regular | symlink | directory) ")"
    regular   = "regular" ["executable" ""] "contents" data
    symlink   = "symlink" "target" text
    directory = "directory" {"entry" "(" "name" text "node" node ")"}, sorted by the bytes of the names
"""

import os
import stat
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Self

from harmonia.errors import StoreObjectError
from harmonia.nix import confined

CHUNK_SIZE = 256 * 1024
"""Bytes: so many that a thread hop per chunk is lost in the noise, so few that each download can hold some."""


_pack_length = struct.Struct("<Q").pack


_PADDINGS = [b"\0" * (-length % 8) for length in range(8)]  # by length modulo 8


def encode(*texts: bytes) -> bytes:
    """Words of the grammar, each with its length and its padding."""
    return b"".join(_pack_length(len(text)) + text + _PADDINGS[len(text) % 8] for text in texts)


_MAGIC = encode(b"nix-archive-1")
_NAME = encode(b"entry", b"(", b"name")
_NODE = encode(b"node")
_REGULAR = encode(b"(", b"type", b"regular", b"contents")
_EXECUTABLE = encode(b"(", b"type", b"regular", b"executable", b"", b"contents")
_SYMLINK = encode(b"(", b"type", b"symlink", b"target")
_DIRECTORY = encode(b"(", b"type", b"directory")
_CLOSE = encode(b")")


@dataclass(slots=True)
class FileSlice:
    """The bytes from `start` to `stop` of a file that was `size` bytes long when it was looked at."""

    path: bytes
    size: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> Self:
        start, stop, _ = part.indices(len(self))
        return type(self)(self.path, self.size, self.start + start, self.start + max(start, stop))


Segment = bytes | FileSlice


class Entry(NamedTuple):
    """A file system object, as much of it as a NAR holds. `mode` tells its type and whether it is executable."""

    depth: int
    """How many directories of the archive it is in: 0 for the root."""
    path: bytes
    """Where it is on disk. Its name in the archive is the last component."""
    mode: int
    size: int
    """The length of a regular file's contents."""
    target: bytes
    """What a symlink points to."""


Frame = tuple[bytes, Entry | None]
"""Words of the archive, and the entry whose contents follow them: none after the last."""


_BATCH = 1024  # entries of a directory that are looked at while it is open


def walk(root: bytes) -> Iterator[Entry]:
    """The objects at and below `root` in the order of a NAR: depth first, names sorted by their bytes.

    No symlink may be on the way to `root` (`confined.resolved`), and none that is put there leads out of it.
    """
    status = os.lstat(root)
    target = os.readlink(root) if stat.S_ISLNK(status.st_mode) else b""
    levels = [iter(((root, status, target),))]
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            continue
        path, status, target = found
        mode = status.st_mode
        depth = len(levels) - 1
        if stat.S_ISREG(mode):
            yield Entry(depth, path, mode, status.st_size, b"")
        elif stat.S_ISDIR(mode):
            yield Entry(depth, path, mode, 0, b"")
            levels.append(_look_into(path))
        elif stat.S_ISLNK(mode):
            yield Entry(depth, path, mode, 0, target)
        else:
            raise StoreObjectError(f"{os.fsdecode(path)} is no regular file, directory or symlink")


def _look_into(directory: bytes) -> Iterator[tuple[bytes, os.stat_result, bytes]]:
    """The paths in a directory, sorted, and what symlinks point to. From the directory itself they are found in less
    time than from the root.
    """
    prefix = directory + b"/"
    names = sorted(os.listdir(directory))  # those of another directory, if one came in its place, are not found in it
    for first in range(0, len(names), _BATCH):
        batch = names[first : first + _BATCH]
        descriptor = confined.open_file(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = [os.stat(name, dir_fd=descriptor, follow_symlinks=False) for name in batch]
            targets = [
                os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
                for name, status in zip(batch, found, strict=True)
            ]
        finally:
            os.close(descriptor)
        yield from zip(map(prefix.__add__, batch), found, targets, strict=True)


def frame(entries: Iterable[Entry]) -> Iterator[Frame]:
    """The frames of the archive of what `walk` found.

    Of only the later entries of a tree, only the first words are others than in the archive of the whole.
    """
    words = _MAGIC
    opened = 0  # directories that are not closed yet
    for entry in entries:
        depth, path, mode, size, target = entry
        # A directory below the root is closed twice: as a node, and as an entry. So is any other node.
        close = _CLOSE * 2 if depth else _CLOSE
        if opened != depth:
            words += _CLOSE * (2 * (opened - depth))
            opened = depth
        if depth:
            name = path[path.rindex(b"/") + 1 :]
            words = b"".join((words, _NAME, _pack_length(len(name)), name, _PADDINGS[len(name) % 8], _NODE))
        if stat.S_ISREG(mode):
            yield words + (_EXECUTABLE if mode & stat.S_IXUSR else _REGULAR) + _pack_length(size), entry
            words = _PADDINGS[size % 8] + close
        elif stat.S_ISLNK(mode):
            yield words + _SYMLINK + encode(target), entry
            words = close
        else:
            yield words + _DIRECTORY, entry
            words = b""
            opened += 1
    yield words + _CLOSE * max(2 * opened - 1, 0), None


def located(entries: Iterable[Entry]) -> Iterator[tuple[int, Entry]]:
    """The entries, each with the offset of its contents in the archive."""
    position = 0
    for words, entry in frame(entries):
        position += len(words)
        if entry is not None:
            yield position, entry
            position += entry.size


def segments(frames: Iterable[Frame]) -> Iterator[Segment]:
    """The archive of what `frame` gives."""
    for words, entry in frames:
        yield words
        if entry is not None and (size := entry.size):
            yield FileSlice(entry.path, size, 0, size)


def dump(path: bytes) -> Iterator[Segment]:
    """The NAR of the file system object at `path`."""
    return segments(frame(walk(confined.resolved(path))))


def window(archive: Iterable[Segment], start: int, stop: int) -> Iterator[Segment]:
    """The bytes from `start` to `stop` of a run of segments."""
    position = 0
    for segment in archive:
        if position >= stop:
            return
        if start < position + len(segment):
            yield segment[max(start - position, 0) : stop - position]
        position += len(segment)


class OpenSlice:
    """The bytes from `position` to `stop` of an open file, of which each read takes the next."""

    __slots__ = ("_descriptor", "position", "stop")

    def __init__(self, descriptor: int, position: int, stop: int) -> None:
        self._descriptor = descriptor
        self.position = position
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.position

    def read(self, size: int = CHUNK_SIZE) -> bytes:
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

    def read_cached(self, size: int = CHUNK_SIZE) -> bytearray | None:
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


def chunks(archive: Iterable[Segment], chunk_size: int = CHUNK_SIZE) -> Generator[bytes | OpenSlice]:
    """The bytes of a run of segments, in chunks of less than twice `chunk_size`, and what files have of no less.

    An open slice is to be read to its end before the next chunk is asked for. StoreObjectError where a file is no
    longer as long as its slice says; OSError where it cannot be read.
    """
    parts: list[bytes] = []
    size = 0
    files = confined.Files()
    try:
        for segment in archive:
            if isinstance(segment, bytes):
                piece = segment
            elif segment.stop - segment.start < chunk_size:
                piece = _small_file(segment, files)
            else:
                files.close()  # a download has one file open while it waits for its client (sockets.admitted)
                if size:
                    yield b"".join(parts)
                    parts, size = [], 0
                yield from _large_file(segment)
                continue
            parts.append(piece)
            size += len(piece)
            if size >= chunk_size:
                files.close()  # it may take long until the next is wanted
                data = b"".join(parts)
                while len(data) >= 2 * chunk_size:  # a single text is longer than a chunk
                    yield data[:chunk_size]
                    data = data[chunk_size:]
                yield data
                del data  # while the next is read
                parts, size = [], 0
        files.close()
        if size:
            yield b"".join(parts)
    finally:
        files.close()


def flatten(chunks: Generator[bytes | OpenSlice], chunk_size: int = CHUNK_SIZE) -> Generator[bytes]:
    """Chunks with what open slices stand for, at most `chunk_size` of it at a time."""
    with closing(chunks):  # and its file at once, not when the last who has an error has forgotten it
        for chunk in chunks:
            if isinstance(chunk, OpenSlice):
                while data := chunk.read(chunk_size):
                    yield data
            else:
                yield chunk


def read_into(buffer: memoryview, chunks: Generator[bytes | OpenSlice]) -> bool:
    """Fill a buffer with what chunks are and stand for. Whether they come to its length, and to no more."""
    filled = 0
    with closing(chunks):
        for chunk in chunks:
            if isinstance(chunk, OpenSlice):
                filled += chunk.read_into(buffer[filled:])
            elif len(chunk) <= len(buffer) - filled:
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
            else:
                return False
    return filled == len(buffer)


def read(archive: Iterable[Segment], chunk_size: int = CHUNK_SIZE) -> Generator[bytes]:
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
