"""GC roots: symlinks to store paths, files named like one, and directories of these.

As in Nix (`src/libstore/gc.cc`, `findRoots`), a symlink in a directory may lead to a store path, but to no other
directory or file.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store

MAX_SYMLINKS = 40  # on the way to a path, as in Linux (path_resolution(7))
NIX_MAX_SYMLINKS = 2  # of a root that Nix finds in its own directories: gcroots/auto/…, result
_MAX_ENTRIES = 100_000  # of the directories with roots


def find(
    store: Store, roots: Sequence[str], report: Callable[[str], object], max_symlinks: int = MAX_SYMLINKS
) -> Iterator[StorePath]:
    """Yield the store paths that the roots lead to, valid or not. Report the roots that cannot be followed."""
    left = _MAX_ENTRIES
    waiting = list(roots)
    while waiting and left:
        left -= 1
        name = waiting.pop()
        try:
            inside, path = follow(store, name, max_symlinks)
            if inside is not None:
                yield StorePath(inside.partition("/")[0])
                continue
            if path != name and name not in roots:
                continue
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                with os.scandir(path) as entries:
                    waiting += (entry.path for entry in entries)
            elif stat.S_ISREG(mode):
                with suppress(FormatError):
                    yield StorePath(os.path.basename(path))
        except FileNotFoundError:
            if name in roots:
                report(f"{name!r} does not exist")
        except (OSError, FormatError) as error:
            report(f"cannot follow {name!r}: {getattr(error, 'strerror', None) or error}")
    if waiting:
        report(f"there are more than {_MAX_ENTRIES} entries; the others are left out")


def follow(
    store: Store, path: str, max_symlinks: int = MAX_SYMLINKS, *, parents: bool = False
) -> tuple[str | None, str]:
    """Follow symlinks up to the store. Return the path in it, or None, and the whole path that they lead to.

    With `parents`, the directories that the path goes through may be symlinks, too. Raises FormatError if there are too
    many symlinks.
    """
    for _ in range(max_symlinks + 1):
        path = os.path.normpath(path)
        if (inside := store.relative(path)) is not None:
            return inside, path
        link = next(filter(os.path.islink, _from_the_top(path) if parents else [path]), None)
        if link is None:
            return None, path
        path = os.path.join(os.path.dirname(link), os.readlink(link) + path[len(link) :])
    raise FormatError("too many symlinks")


def _from_the_top(path: str) -> Iterator[str]:
    """Yield the directories that an absolute path goes through, and the path itself."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(2, len(parts) + 1))
