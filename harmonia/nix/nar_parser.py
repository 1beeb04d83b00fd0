"""NAR parser, as strict as Nix 2.34.7 and newer (`src/libutil/archive.cc`), in bounded memory.

`parse` accepts only an archive that `nar.serialize` would write byte for byte: each tree has exactly one archive.
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

_PIECE_BYTES = 256 * 1024  # maximum of a piece of a file's contents


class _Source:
    """The bytes of an archive that arrive in chunks, read in the portions of the grammar."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = memoryview(b"")

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the next `size` bytes in pieces as they arrive. Memory use does not depend on `size`.

        Raises FormatError if the archive ends before.
        """
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
            raise FormatError(f"{what} has {size} bytes, more than the maximum of {longest}")
        text = self.take(size)
        self.padding(size)
        return text

    def word(self) -> bytes:
        return self.text(_MAX_WORD_BYTES, "a word")

    def expect(self, words: bytes) -> None:
        if (actual := self.take(len(words))) != words:
            raise FormatError(f"expected {words!r}, found {actual!r}")

    def end(self) -> None:
        if self._chunk or any(self._chunks):
            raise FormatError("data follows the end of the archive")


def parse(chunks: Iterable[bytes]) -> Iterator[Entry | bytes]:
    """Yield the entries of an archive. After the entry of a regular file, yield the file's contents in pieces.

    The paths are those within the archive: `b""` for its root, and a slash before each name, as in `b"/bin/sh"`.
    Raises FormatError if the chunks do not form an archive.
    """
    source = _Source(chunks)
    source.expect(_MAGIC)
    yield from _node(source, b"", 0)
    source.end()


def _node(source: _Source, path: bytes, depth: int) -> Iterator[Entry | bytes]:
    if depth >= MAX_DEPTH:
        raise FormatError(f"directories are nested {depth} deep; the maximum is {MAX_DEPTH - 1}")
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
                raise FormatError(f"expected a file's contents, found {word!r}")
            size = source.number()
            yield Entry(depth, path, mode, size, b"")
            yield from source.pieces(size)
            source.padding(size)
        case b"symlink":
            source.expect(_TARGET)
            target = source.text(MAX_TARGET_BYTES, "a symlink's target")
            if not target or b"\0" in target:
                raise FormatError(f"{target!r} cannot be the target of a symlink")
            yield Entry(depth, path, stat.S_IFLNK | 0o777, 0, target)
        case b"directory":
            yield Entry(depth, path, stat.S_IFDIR | 0o555, 0, b"")
            yield from _entries(source, path, depth + 1)
            return
        case kind:
            raise FormatError(f"{kind!r} is not a file type")
    source.expect(_CLOSE)


def _entries(source: _Source, path: bytes, depth: int) -> Iterator[Entry | bytes]:
    previous = b""
    while (word := source.word()) == b"entry":
        source.expect(_NAME)
        name = source.text(MAX_NAME_BYTES, "a name")
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise FormatError(f"{name!r} cannot be a name in a directory")
        if name <= previous:
            raise FormatError(f"{name!r} follows {previous!r}, but names must be sorted and unique")
        previous = name
        source.expect(_NODE)
        yield from _node(source, path + b"/" + name, depth)
        source.expect(_CLOSE)
    if word != b")":
        raise FormatError(f"expected a directory's next entry or its end, found {word!r}")


def restore(parts: Iterable[Entry | bytes], root: bytes) -> None:
    """Write the entries and contents that `parse` yields to the file system, below the path `root`.

    Raises FileExistsError if `root` exists. After any error, the files written so far remain.
    """
    parts = iter(parts)
    for entry in parts:
        assert isinstance(entry, Entry)  # noqa: S101 (each file's contents are consumed below)
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
