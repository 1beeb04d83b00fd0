"""NAR, the archive format of store objects (Nix `src/libutil/archive.cc`), as a lazy run of segments.

A segment is `bytes` that are known, or a `FileSlice` that stands for bytes not read yet. Both have a length and can be
sliced, and that is all that sizes, byte ranges and streaming need: no file is opened before its bytes are wanted.
`store/tree_reader.py` finds the entries of a tree on disk, `store/file_reader.py` reads the bytes of segments.

The grammar, where each word, name and data is its length in 8 bytes, its bytes, and zeros up to a multiple of 8::

    archive   = "nix-archive-1" node
    node      = "(" "type" (regular | symlink | directory) ")"
    regular   = "regular" ["executable" ""] "contents" data
    symlink   = "symlink" "target" text
    directory = "directory" {"entry" "(" "name" text "node" node ")"}, sorted by the bytes of the names
"""

import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

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


NarHeader = tuple[bytes, Entry | None]
"""Words of the archive, and the entry whose contents follow them: none after the last."""


def serialize(entries: Iterable[Entry]) -> Iterator[NarHeader]:
    """The headers of the archive of what a walk found.

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
    for words, entry in serialize(entries):
        position += len(words)
        if entry is not None:
            yield position, entry
            position += entry.size


def segments(headers: Iterable[NarHeader]) -> Iterator[Segment]:
    """The archive of what `serialize` gives."""
    for words, entry in headers:
        yield words
        if entry is not None and (size := entry.size):
            yield FileSlice(entry.path, size, 0, size)


def window(archive: Iterable[Segment], start: int, stop: int) -> Iterator[Segment]:
    """The bytes from `start` to `stop` of a run of segments."""
    position = 0
    for segment in archive:
        if position >= stop:
            return
        if start < position + len(segment):
            yield segment[max(start - position, 0) : stop - position]
        position += len(segment)
