"""Reading an archive: as strict as Nix 2.34.7 and newer (`src/libutil/archive.cc`), in bounded memory.

Whatever `parse` takes is an archive that `nar.serialize` would write: no two texts say the same.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from typing import cast

from harmonia.errors import FormatError
from harmonia.nix.nar import Entry, encode

MAX_DEPTH = 64
MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095
_MAX_WORD_BYTES = 32

_MAGIC = encode(b"nix-archive-1")
_TYPE = encode(b"(", b"type")
_EMPTY = encode(b"")
_TARGET = encode(b"target")
_NAME = encode(b"(", b"name")
_NODE = encode(b"node")
_CLOSE = encode(b")")

_PIECE_BYTES = 256 * 1024  # a file's contents are given on in pieces of at most so many bytes


class _Source:
    """Bytes that come in chunks, taken in the portions that the grammar wants."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = memoryview(b"")

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, as they come. No memory is taken on the word of `size`."""
        while size:
            if not self._chunk:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise FormatError("the archive ends early")
                self._chunk = memoryview(chunk)
                continue
            piece, self._chunk = self._chunk[: min(size, _PIECE_BYTES)], self._chunk[min(size, _PIECE_BYTES) :]
            size -= len(piece)
            yield bytes(piece)

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def padding(self, size: int) -> None:
        if any(self.take(-size % 8)):
            raise FormatError("padding is not zero")

    def text(self, longest: int, what: str) -> bytes:
        size = self.number()
        if size > longest:
            raise FormatError(f"{what} of {size} bytes, where at most {longest} may be")
        text = self.take(size)
        self.padding(size)
        return text

    def word(self) -> bytes:
        return self.text(_MAX_WORD_BYTES, "a word")

    def expect(self, words: bytes) -> None:
        if (found := self.take(len(words))) != words:
            raise FormatError(f"{found!r} where {words!r} should be")

    def end(self) -> None:
        if self._chunk or any(self._chunks):
            raise FormatError("there is more after the end of the archive")


def parse(chunks: Iterable[bytes]) -> Iterator[Entry | bytes]:
    """The entries of an archive, each file's followed by its contents in pieces. FormatError where it is none.

    The paths are those within the archive: `b""` for its root, and a slash before each name, as in `b"/bin/sh"`.
    """
    source = _Source(chunks)
    source.expect(_MAGIC)
    yield from _node(source, b"", 0)
    source.end()


def _node(source: _Source, path: bytes, depth: int) -> Iterator[Entry | bytes]:
    if depth >= MAX_DEPTH:
        raise FormatError(f"directories nested {depth} deep, where fewer than {MAX_DEPTH} may be")
    source.expect(_TYPE)
    match source.word():
        case b"regular":
            mode = stat.S_IFREG | 0o444
            word = source.word()
            if word == b"executable":
                source.expect(_EMPTY)
                mode |= 0o111
                word = source.word()
            if word != b"contents":
                raise FormatError(f"{word!r} where a file's contents should be")
            size = source.number()
            yield Entry(depth, path, mode, size, b"")
            yield from source.pieces(size)
            source.padding(size)
        case b"symlink":
            source.expect(_TARGET)
            target = source.text(MAX_TARGET_BYTES, "a symlink's target")
            if not target or b"\0" in target:
                raise FormatError(f"{target!r} cannot be what a symlink points to")
            yield Entry(depth, path, stat.S_IFLNK | 0o777, 0, target)
        case b"directory":
            yield Entry(depth, path, stat.S_IFDIR | 0o555, 0, b"")
            yield from _entries(source, path, depth + 1)
            return
        case kind:
            raise FormatError(f"{kind!r} is no type of file")
    source.expect(_CLOSE)


def _entries(source: _Source, path: bytes, depth: int) -> Iterator[Entry | bytes]:
    previous = b""
    while (word := source.word()) == b"entry":
        source.expect(_NAME)
        name = source.text(MAX_NAME_BYTES, "a name")
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise FormatError(f"{name!r} cannot be a name in a directory")
        if name <= previous:
            raise FormatError(f"{name!r} after {previous!r}: names are sorted, and each is there once")
        previous = name
        source.expect(_NODE)
        yield from _node(source, path + b"/" + name, depth)
        source.expect(_CLOSE)
    if word != b")":
        raise FormatError(f"{word!r} where a directory's next entry or its end should be")


def restore(parts: Iterable[Entry | bytes], root: bytes) -> None:
    """Write what `parse` gives to `root`, where nothing may be: FileExistsError. An error leaves what was written."""
    parts = iter(parts)
    for entry in parts:
        assert isinstance(entry, Entry)  # noqa: S101 (the contents of a file are taken with it)
        path = root + entry.path
        if stat.S_ISDIR(entry.mode):
            os.mkdir(path)
        elif stat.S_ISLNK(entry.mode):
            os.symlink(entry.target, path)
        else:
            mode = 0o777 if entry.mode & stat.S_IXUSR else 0o666  # less the umask, as Nix restores them
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
                while file.tell() < entry.size:
                    file.write(cast("bytes", next(parts)))
