"""GC roots: symlinks to store paths, files with the name of a store path, and directories with such roots.

As in Nix (`src/libstore/gc.cc`, `findRoots`), a symlink in a directory must lead to a store path. Symlinks to other
files and directories are not followed.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store

MAX_SYMLINKS = 40  # in one lookup, as in Linux (path_resolution(7))
NIX_MAX_SYMLINKS = 2  # of a root in Nix's own directories: gcroots/auto/…, result
_MAX_ENTRIES = 100_000  # in the directories with roots


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
        report(f"more than {_MAX_ENTRIES} entries; the others are ignored, so name fewer directories")


def follow(
    store: Store, path: str, max_symlinks: int = MAX_SYMLINKS, *, parents: bool = False
) -> tuple[str | None, str]:
    """Follow symlinks until the store is reached. Return the path relative to the store, or None, and the full path.

    With `parents`, symlinks in any component of the path are followed.
    Raises FormatError if there are too many symlinks.
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
    """Yield the parent directories of an absolute path, from the top, and the path itself."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(2, len(parts) + 1))
