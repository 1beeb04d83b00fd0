"""Walk of a file system tree in the order of a NAR. It follows no symlinks."""

import os
import stat
from collections.abc import Iterator
from heapq import merge
from itertools import islice

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import Entry, Segment, segments, serialize
from harmonia.store import confined

_BATCH_ENTRIES = 1024  # entries of a directory that are looked at while it is open
_SORT_MAX_NAMES = 8192  # names: some milliseconds
_JOINED_NAMES = 256  # names that become one object


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
    names = _sorted_names(directory)  # those of another directory, if one came in its place, are not found
    while batch := list(islice(names, _BATCH_ENTRIES)):
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


def _sorted_names(directory: bytes) -> Iterator[bytes]:
    """Return the names in a directory, sorted by their bytes.

    No step takes long, because other threads wait for each. Many names are kept as few objects, in little memory.
    """
    runs: list[list[bytes]] = []
    with os.scandir(directory) as found:
        names = (entry.name for entry in found)
        while run := sorted(islice(names, _SORT_MAX_NAMES)):
            if len(run) < _SORT_MAX_NAMES and not runs:
                return iter(run)
            runs.append([b"/".join(run[first : first + _JOINED_NAMES]) for first in range(0, len(run), _JOINED_NAMES)])
    return merge(*map(_split, runs))


def _split(run: list[bytes]) -> Iterator[bytes]:
    for names in run:
        yield from names.split(b"/")


def dump(path: bytes) -> Iterator[Segment]:
    """The NAR of the file system object at `path`."""
    return segments(serialize(walk(confined.resolved(path))))
