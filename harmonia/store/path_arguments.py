"""Which store paths are meant: by what is typed, by references, by the roots of the garbage collector."""

import os
import stat
from collections.abc import Iterable, Iterator

from harmonia.errors import FormatError, InvalidPathError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.store.store import Store

_MAX_SYMLINKS = 40  # symlinks on the way, as in Linux (path_resolution(7))


def named(store: Store, text: str) -> tuple[PathInfo, bytes]:
    """The valid path that is meant, and where on disk what is named in it lies. InvalidPathError.

    It may be named in full, by its base name or hash part, or by a symlink that leads to it, such as `result`.
    """
    base_name, _, inside = (_in_store(store, text) or text).partition("/")
    hash_part = base_name[:32]
    info = store.path_info(hash_part) if is_hash_part(hash_part) else None
    if info is None or base_name not in (hash_part, info.path):
        what = f"{text!r} names no valid path of the store {store.store_dir}"
        raise InvalidPathError(f"{what}; give its path, its hash part, or a symlink that leads to it")
    real_path = store.real_path(info.path)
    return info, os.path.join(real_path, os.fsencode(inside)) if inside else real_path


def _in_store(store: Store, text: str) -> str | None:
    """The path below the store directory that `text` names, after symlinks on the way there, or None."""
    path = os.path.abspath(text)
    for _ in range(_MAX_SYMLINKS):
        for directory in (store.store_dir, store.real_dir):
            if path.startswith(directory + "/"):
                return path[len(directory) + 1 :]
        parts = path.split("/")
        prefixes = (("/".join(parts[:end]), parts[end:]) for end in range(2, len(parts) + 1))
        link, rest = next(((prefix, rest) for prefix, rest in prefixes if os.path.islink(prefix)), (None, []))
        if link is None:
            return None
        path = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link), *rest))
    return None


def closure(store: Store, paths: Iterable[StorePath]) -> list[StorePath]:
    """The paths and all that they refer to, in turn. InvalidPathError where one of them is not valid."""
    found = dict.fromkeys(paths)
    waiting = list(found)
    while waiting:
        path = waiting.pop()
        info = store.path_info(path.hash_part)
        if info is None or info.path != path:
            raise InvalidPathError(f"{store.store_dir}/{path} is no valid path")
        new = [reference for reference in info.references if reference not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return list(found)


def gc_roots(store: Store, state_dir: str) -> list[StorePath]:
    """The valid paths that the roots in Nix's state directory keep: profiles, and results of builds.

    Nix `src/libstore/gc.cc`, `findRoots`: a root is a symlink into the store, or to such a symlink, or a file that is
    called like the path. OSError where they cannot be read.
    """
    targets = [target for name in ("gcroots", "profiles") for target in _roots(os.path.join(state_dir, name))]
    found: dict[StorePath, None] = {}
    for target in targets:
        for directory in (store.store_dir, store.real_dir):
            if target.startswith(directory + "/"):
                target = target[len(directory) + 1 :]  # noqa: PLW2901 (the same without its directory)
        try:
            path = StorePath(target.partition("/")[0])
        except FormatError:
            continue
        info = store.path_info(path.hash_part)
        if info is not None and info.path == path:
            found[path] = None
    return list(found)


def _roots(path: str) -> Iterator[str]:
    """Where the roots at and below `path` lead to."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            for name in sorted(os.listdir(path)):
                yield from _roots(os.path.join(path, name))
        elif stat.S_ISLNK(mode):
            target = os.path.join(os.path.dirname(path), os.readlink(path))
            yield target
            if os.path.islink(target):
                yield os.path.join(os.path.dirname(target), os.readlink(target))
        elif stat.S_ISREG(mode):
            yield os.path.basename(path)
    except FileNotFoundError:
        pass  # removed just now
