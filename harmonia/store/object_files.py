"""Lookup of single files and directories in a store object on disk.

Each name of a path is opened in the directory before it, without following symlinks (openat(2), O_NOFOLLOW). So the
lookup cannot leave the store object, whatever other processes change meanwhile. The target of a symlink is returned to
the caller, who looks it up in turn.
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
from harmonia.store.file_reader import OpenSlice, ReadOnly
from harmonia.store.store import Store

SAMPLE_BYTES = 64 * 1024
"""The length of the sample of a file, from which its content type is guessed."""

_FLAGS = os.O_RDONLY | os.O_NONBLOCK


@contextmanager
def _opened(top: bytes, names: Sequence[bytes]) -> Iterator[int]:
    """Open the file or directory at the path of `names` in the store object `top`, and yield its descriptor.

    Raises OSError if that fails.
    """
    descriptor = confined.open_in_turn((top, *names), _FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Entry(NamedTuple):
    """The file or directory at the path of `names` in the store path `info`. The path has no symlinks."""

    info: PathInfo
    names: Sequence[bytes]
    status: os.stat_result
    sample: bytes
    """The first bytes of a file, at most `SAMPLE_BYTES`; empty for a directory."""


@dataclass(frozen=True, slots=True)
class File(ReadOnly):
    """The contents of a file that `lookup_entry` returned, with the status from that time."""

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
        """Yield the bytes from `start` to `stop` or to the end, as one slice of the open file.

        Raises StoreObjectError if another file has replaced it.
        """
        with _opened(self.top, self.names) as descriptor:
            if not os.path.samestat(os.fstat(descriptor), self.status):
                raise StoreObjectError(f"{self} changed while it was sent")
            yield OpenSlice(descriptor, start, self.size if stop is None else stop)


def lookup_entry(store: Store, info: PathInfo, names: Sequence[bytes]) -> Entry | list[bytes] | None:
    """Return the entry at the path of `names` in a store path.

    If the path has a symlink or `..`, return the path after the first of these, as names below the store directory.
    Return None if there is no file or directory, or if the first symlink leads out of the store.
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


class DirectoryEntry(NamedTuple):
    """An entry of a directory."""

    name: bytes
    mode: int
    size: int
    target: bytes


def list_directory(top: bytes, names: Sequence[bytes], most: int) -> tuple[list[DirectoryEntry], int]:
    """Return the first `most` entries of a directory, and the number of all.

    Directories come first. Each group is sorted by the bytes of the names.
    """
    count = 0

    def counted() -> Iterator[tuple[bool, bytes]]:
        nonlocal count
        with os.scandir(descriptor) as entries:
            for entry in entries:
                count += 1
                yield not entry.is_dir(follow_symlinks=False), os.fsencode(entry.name)

    def described(name: bytes) -> DirectoryEntry:
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        target = os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
        return DirectoryEntry(name, status.st_mode, status.st_size, target)

    with _opened(top, names) as descriptor:
        first = heapq.nsmallest(most, counted())
        return [described(name) for _, name in first], count
