"""Which store paths are meant: by what is typed, by references, by the roots of the garbage collector."""

import logging
import os
from collections.abc import Iterable

from harmonia.errors import FormatError, InvalidPathError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.store import queries
from harmonia.store.gc_roots import NIX_MAX_SYMLINKS, find, follow
from harmonia.store.store import Store

_log = logging.getLogger("harmonia")


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
    """Return the path in the store directory that `text` names, after symlinks on the way there, or None."""
    try:
        return follow(store, os.path.abspath(text), parents=True)[0]
    except FormatError:
        return None


def closure(store: Store, paths: Iterable[StorePath]) -> list[StorePath]:
    """Return the paths and all that they refer to, in turn. Raises InvalidPathError if one of them is not valid."""
    given = set(paths)
    found = queries.closure_paths(store, given)
    for path in given.difference(found):
        raise InvalidPathError(f"{store.store_dir}/{path} is no valid path")
    return found


def gc_roots(store: Store, state_dir: str) -> list[StorePath]:
    """Return the valid paths that the roots in Nix's state directory keep: profiles, and results of builds."""
    directories = [os.path.join(state_dir, name) for name in ("gcroots", "profiles")]
    roots = find(store, list(filter(os.path.isdir, directories)), _report, NIX_MAX_SYMLINKS)
    return [path for path in dict.fromkeys(roots) if _is_valid(store, path)]


def _is_valid(store: Store, path: StorePath) -> bool:
    info = store.path_info(path.hash_part)
    return info is not None and info.path == path


def _report(trouble: str) -> None:
    _log.warning("GC roots: %s", trouble)
