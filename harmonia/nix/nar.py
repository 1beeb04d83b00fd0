"""NAR, the archive format of store objects (Nix `src/libutil/archive.cc`), as a lazy run of segments.

A segment is `bytes`, or a `FileSlice` that stands for bytes not read yet. Both have a length and can be sliced. Sizes,
byte ranges and streaming need no more than that, so a file is opened only when its bytes are sent.
`store/tree_reader.py` finds the entries of a tree on disk, `store/file_reader.py` reads the bytes of segments.

The grammar follows. Each word, name and data is encoded as its length in 8 bytes, its bytes, and zeros up to a multiple
of 8::

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
    """Return the words of the grammar, each with its length and its padding."""
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
    """The bytes from `start` to `stop` of a file. `size` is the file's length in bytes when the tree was walked."""

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
    """A file system object with the properties that a NAR stores."""

    depth: int
    """The number of the archive's directories around the object: 0 for the root."""
    path: bytes
    """The path on disk. Its last component is the name in the archive."""
    mode: int
    """The file type and the permissions, as in `st_mode`. A NAR stores only the owner's permission to execute."""
    size: int
    """The length of a regular file's contents in bytes."""
    target: bytes
    """The target of a symlink."""


NarHeader = tuple[bytes, Entry | None]
"""Encoded words of the archive, and the entry whose contents follow them, or None after the last entry."""


def serialize(entries: Iterable[Entry]) -> Iterator[NarHeader]:
    """Yield the headers of the archive of these entries, in the order of a walk.

    Given only the later entries of a tree, the headers are those of the full archive, except the first one.
    """
    words = _MAGIC
    opened = 0  # directories that are still open
    for entry in entries:
        depth, path, mode, size, target = entry
        # Every node below the root is closed twice: as a node, and as an entry.
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
    """Yield the entries, each with the offset in bytes of its contents in the archive."""
    position = 0
    for words, entry in serialize(entries):
        position += len(words)
        if entry is not None:
            yield position, entry
            position += entry.size


def segments(headers: Iterable[NarHeader]) -> Iterator[Segment]:
    """Yield the segments of the archive with these headers, which come from `serialize`."""
    for words, entry in headers:
        yield words
        if entry is not None and (size := entry.size):
            yield FileSlice(entry.path, size, 0, size)


def window(archive: Iterable[Segment], start: int, stop: int) -> Iterator[Segment]:
    """Yield the segments of the byte range from `start` to `stop` of an archive."""
    position = 0
    for segment in archive:
        if position >= stop:
            return
        if start < position + len(segment):
            yield segment[max(start - position, 0) : stop - position]
        position += len(segment)
