"""Walk of a file system tree in the order of a NAR, without following symlinks."""

import os
import stat
from collections.abc import Callable, Generator, Iterator
from heapq import merge
from itertools import islice

from harmonia.errors import StoreObjectError
from harmonia.nix.nar import Entry, Segment, segments, serialize
from harmonia.store import confined

_BATCH_ENTRIES = 1024  # entries of a directory that are read while it is open
_SORT_MAX_NAMES = 8192  # names that are sorted in one step of some milliseconds
_JOINED_NAMES = 256  # names that are joined to one bytes object
_STEP_ENTRIES = 16  # after which `read_small` yields
_ENTRY_MIN_BYTES = 168  # of an entry of a directory in a NAR

# Without O_NONBLOCK, to open a fifo blocks.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def walk(root: bytes) -> Iterator[Entry]:
    """Yield the entries at and below `root` in the order of a NAR: depth first, names sorted by their bytes.

    The caller must resolve symlinks in the path of `root` (`confined.resolved`). A symlink that another process creates
    during the walk is not followed. Raises StoreObjectError if a file has a type that a NAR cannot store.
    """
    return _depth_first(_root_entry(root), _look_into)


def _depth_first(root: Entry, entries_of: Callable[[Entry], Iterator[Entry]]) -> Iterator[Entry]:
    levels = [iter((root,))]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            continue
        yield entry
        if stat.S_ISDIR(entry.mode):
            levels.append(entries_of(entry))


def _root_entry(root: bytes) -> Entry:
    status = os.lstat(root)
    return _entry(0, root, status, os.readlink(root) if stat.S_ISLNK(status.st_mode) else b"")


def _entry(depth: int, path: bytes, status: os.stat_result, target: bytes) -> Entry:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return Entry(depth, path, mode, status.st_size, target)
    if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        return Entry(depth, path, mode, 0, target)
    raise StoreObjectError(f"{os.fsdecode(path)} is not a regular file, directory or symlink")


def _look_into(parent: Entry) -> Iterator[Entry]:
    """Yield the entries of a directory, sorted by name.

    Relative to the open directory, the lookups are faster than by full paths.
    """
    prefix, depth = parent.path + b"/", parent.depth + 1
    names = _sorted_names(parent.path)  # if another directory replaces this one, os.stat below fails
    while batch := list(islice(names, _BATCH_ENTRIES)):
        descriptor = confined.open_file(parent.path, _DIRECTORY)
        try:
            statuses = [os.stat(name, dir_fd=descriptor, follow_symlinks=False) for name in batch]
            targets = [
                os.readlink(name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else b""
                for name, status in zip(batch, statuses, strict=True)
            ]
        finally:
            os.close(descriptor)
        for name, status, target in zip(batch, statuses, targets, strict=True):
            yield _entry(depth, prefix + name, status, target)


def read_small(root: bytes, limit: int) -> Generator[None, None, bytes]:
    """Return the NAR of the tree at `root`, like `dump`, but read in one pass. Its contents have at most `limit` bytes.

    The caller must check the hash of the NAR. Therefore a directory that another process replaces by a symlink
    meanwhile is no danger, and files are opened by their paths, which takes half of the time of `walk` and a second
    pass for the contents. Yields after some entries, so that the caller can do other work. Raises StoreObjectError if
    there is more than `limit`, or if a file has changed its length.
    """
    first = _root_entry(root)
    contents: dict[bytes, Iterator[Entry]] = {}
    waiting = [first] if stat.S_ISDIR(first.mode) else []
    if stat.S_ISREG(first.mode):
        first = _read_file(0, root, limit)
    while waiting:
        directory = waiting.pop()
        depth = directory.depth + 1
        entries: list[Entry] = []
        with os.scandir(directory.path) as found:
            names = [
                (entry.path, entry.is_symlink(), entry.is_dir(follow_symlinks=False))
                for entry in islice(found, limit // _ENTRY_MIN_BYTES + 1)  # one more makes the limit negative below
            ]
        for path, is_symlink, is_directory in sorted(names):
            if is_directory:
                entry = Entry(depth, path, stat.S_IFDIR, 0, b"")
                waiting.append(entry)
            elif is_symlink:
                entry = Entry(depth, path, stat.S_IFLNK, 0, os.readlink(path))
            else:
                entry = _read_file(depth, path, limit)
            limit -= _ENTRY_MIN_BYTES + entry.size
            if limit < 0:
                raise _too_long(root)
            entries.append(entry)
            if len(entries) % _STEP_ENTRIES == 0:
                yield
        yield
        contents[directory.path] = iter(entries)
    parts: list[bytes] = []
    for words, header in serialize(_depth_first(first, lambda directory: contents[directory.path])):
        parts.append(words)
        if header is not None and header.size:
            parts.append(header.target)
    return b"".join(parts)


def _read_file(depth: int, path: bytes, limit: int) -> Entry:
    """Return the entry of a file, with its contents as `target`."""
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise StoreObjectError(f"{os.fsdecode(path)} is not a regular file, directory or symlink")
        if size > limit:
            raise _too_long(path)
        data = os.read(descriptor, size + 1)  # one byte more, to detect that the file has grown
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise StoreObjectError(f"{os.fsdecode(path)} changed its length while it was read")
    return Entry(depth, path, status.st_mode, size, data)


def _too_long(path: bytes) -> StoreObjectError:
    return StoreObjectError(f"{os.fsdecode(path)} is larger than the registered NAR")


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
