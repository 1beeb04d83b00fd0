"""Walk of a file system tree in the order of a NAR, without following symlinks."""

import os
import stat
from collections.abc import Iterator
from heapq import merge
from itertools import islice

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import Entry, Segment, segments, serialize
from harmonia.store import confined

_BATCH_ENTRIES = 1024  # entries of a directory that are read while it is open
_SORT_MAX_NAMES = 8192  # names that are sorted in one step of some milliseconds
_JOINED_NAMES = 256  # names that are joined to one bytes object


def walk(root: bytes) -> Iterator[Entry]:
    """Yield the entries at and below `root` in the order of a NAR: depth first, names sorted by their bytes.

    The caller must resolve symlinks in the path of `root` (`confined.resolved`). A symlink that another process creates
    during the walk is not followed. Raises StoreObjectError if a file has a type that a NAR cannot store.
    """
    status = os.lstat(root)
    target = os.readlink(root) if stat.S_ISLNK(status.st_mode) else b""
    levels = [iter(((root, status, target),))]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            continue
        path, status, target = entry
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
            raise StoreObjectError(f"{os.fsdecode(path)} is not a regular file, directory or symlink")


def _look_into(directory: bytes) -> Iterator[tuple[bytes, os.stat_result, bytes]]:
    """Yield the path, status and symlink target of each entry of a directory, sorted by name.

    Relative to the open directory, the lookups are faster than by full paths.
    """
    prefix = directory + b"/"
    names = _sorted_names(directory)  # if another directory replaces this one, os.stat below fails
    while batch := list(islice(names, _BATCH_ENTRIES)):
        descriptor = confined.open_file(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            statuses = [os.stat(name, dir_fd=descriptor, follow_symlinks=False) for name in batch]
            targets = [
                os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
                for name, status in zip(batch, statuses, strict=True)
            ]
        finally:
            os.close(descriptor)
        yield from zip(map(prefix.__add__, batch), statuses, targets, strict=True)


def _sorted_names(directory: bytes) -> Iterator[bytes]:
    """Return the names in a directory, sorted by their bytes.

    Each step is short, because other threads wait for the GIL. Names are joined to few objects to save memory.
    """
    runs: list[list[bytes]] = []
    with os.scandir(directory) as entries:
        names = (entry.name for entry in entries)
        while run := sorted(islice(names, _SORT_MAX_NAMES)):
            if len(run) < _SORT_MAX_NAMES and not runs:
                return iter(run)
            runs.append([b"/".join(run[first : first + _JOINED_NAMES]) for first in range(0, len(run), _JOINED_NAMES)])
    return merge(*map(_split, runs))


def _split(run: list[bytes]) -> Iterator[bytes]:
    for names in run:
        yield from names.split(b"/")


def dump(path: bytes) -> Iterator[Segment]:
    """Yield the segments of the NAR of the file system object at `path`."""
    return segments(serialize(walk(confined.resolved(path))))
