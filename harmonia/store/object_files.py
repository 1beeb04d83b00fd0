"""What is in a store object, one entry at a time, as it is now on disk.

Nothing is looked up by a path of more than one name. Each name is opened in the directory opened before, and never a
symlink with it (openat(2), O_NOFOLLOW): whatever is changed meanwhile, no name leads anywhere else. Symlinks are read,
and told to who asked.
"""

import errno
import heapq
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from harmonia.errors import StoreObjectError
from harmonia.nix.path_info import PathInfo
from harmonia.store import confined
from harmonia.store.file_reader import OpenSlice
from harmonia.store.store import Store

SAMPLE_BYTES = 64 * 1024
"""Bytes of a file that are looked at before it is read."""

_FLAGS = os.O_RDONLY | os.O_NONBLOCK


@contextmanager
def _opened(top: bytes, names: Sequence[bytes]) -> Iterator[int]:
    """Open what has these names in the store object at `top`. Raises OSError."""
    descriptor = confined.open_in_turn((top, *names), _FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Entry(NamedTuple):
    """What is at `names` below the store path `info`, which no symlink is part of."""

    info: PathInfo
    names: Sequence[bytes]
    status: os.stat_result
    sample: bytes
    """The beginning of a file, `SAMPLE_BYTES` bytes at most."""


@dataclass(frozen=True, slots=True)
class File:
    """The contents of a file that was looked at before. StoreObjectError where there is another in its place."""

    top: bytes
    names: Sequence[bytes]
    status: os.stat_result
    sha256: None = None

    def __str__(self) -> str:
        return os.fsdecode(b"/".join((self.top, *self.names)))

    @property
    def size(self) -> int:
        return self.status.st_size

    def read(self, start: int, stop: int | None) -> Generator[OpenSlice]:
        with _opened(self.top, self.names) as descriptor:
            if not os.path.samestat(os.fstat(descriptor), self.status):
                raise StoreObjectError(f"{self} was changed while it was served")
            yield OpenSlice(descriptor, start, self.size if stop is None else stop)


def look(store: Store, info: PathInfo, names: Sequence[bytes]) -> Entry | list[bytes] | None:
    """The entry at `names`; or where the first symlink or `..` leads, as names in the store directory.

    None where there is nothing that can be served, or where it leads elsewhere.
    """
    top = store.real_path(info.path)
    parts = [os.fsencode(info.path), *names]
    up = parts.index(b"..") if b".." in parts else len(parts)
    try:
        with _opened(top, parts[1:up]) as descriptor:
            status = os.fstat(descriptor)
            if up < len(parts) and stat.S_ISDIR(status.st_mode):
                return parts[: up - 1] + parts[up + 1 :]
            if up == len(parts) and stat.S_ISREG(status.st_mode):
                return Entry(info, names, status, os.pread(descriptor, SAMPLE_BYTES, 0))
            if up == len(parts) and stat.S_ISDIR(status.st_mode):
                return Entry(info, names, status, b"")
    except confined.SymlinkError as link:
        target = [name for name in link.target.split(b"/") if name not in (b"", b".")]
        rest = parts[link.depth + 1 :]
        if not link.target.startswith(b"/"):
            return parts[: link.depth] + target + rest
        store_dir = os.fsencode(store.store_dir).strip(b"/").split(b"/")
        if target[: len(store_dir)] == store_dir:
            return target[len(store_dir) :] + rest
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) or error.filename == top:
            raise
    return None


class Listed(NamedTuple):
    name: bytes
    mode: int
    size: int
    target: bytes


def listed(top: bytes, names: Sequence[bytes], most: int) -> tuple[list[Listed], int]:
    """The `most` first entries of a directory in the order of their bytes, and how many there are."""
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        with os.scandir(descriptor) as entries:
            for entry in entries:
                count += 1
                yield os.fsencode(entry.name)

    def look(name: bytes) -> Listed:
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        target = os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
        return Listed(name, status.st_mode, status.st_size, target)

    with _opened(top, names) as descriptor:
        first = heapq.nsmallest(most, counted())
        return [look(name) for name in first], count
