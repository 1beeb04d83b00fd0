"""Store paths for the arguments of commands, their closures, and the garbage collector's roots."""

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


def resolve(store: Store, text: str) -> tuple[PathInfo, bytes]:
    """Return the valid path that `text` names, and the path on disk of the named file in it.

    `text` is a full path, a base name, a hash part, or a symlink to a store path, such as `result`. Each may be
    followed by the path of a file in it. Raises InvalidPathError if `text` does not name a valid path.
    """
    base_name, _, inside = (_in_store(store, text) or text).partition("/")
    hash_part = base_name[:32]
    info = store.path_info(hash_part) if is_hash_part(hash_part) else None
    if info is None or base_name not in (hash_part, info.path):
        what = f"{text!r} does not name a valid path of the store {store.store_dir}"
        raise InvalidPathError(f"{what}; give its path, its hash part, or a symlink that leads to it")
    real_path = store.real_path(info.path)
    return info, os.path.join(real_path, os.fsencode(inside)) if inside else real_path


def hash_part_of(store: Store, text: str) -> str | None:
    """Return the hash part that `text` names in the forms of `resolve`, also of a path that is not valid, or None."""
    base_name = (store.relative(text) or _in_store(store, text) or text).partition("/")[0]
    hash_part, dash = base_name[:32], base_name[32:33]
    return hash_part if is_hash_part(hash_part) and dash in ("", "-") else None


def _in_store(store: Store, text: str) -> str | None:
    """Return the path relative to the store directory to which `text` leads through symlinks, or None if elsewhere."""
    try:
        return follow(store, os.path.abspath(text), parents=True)[0]
    except FormatError:
        return None


def closure(store: Store, paths: Iterable[StorePath]) -> list[StorePath]:
    """Return the paths and all paths that they refer to, directly or indirectly.

    Raises InvalidPathError if one of `paths` is not valid.
    """
    given = set(paths)
    needed = queries.closure_paths(store, given)
    for path in given.difference(needed):
        raise InvalidPathError(f"{store.store_dir}/{path} is not a valid path")
    return needed


def gc_roots(store: Store, state_dir: str) -> list[StorePath]:
    """Return the valid paths of the GC roots in Nix's state directory: profiles, and results of builds.

    Log the roots that cannot be followed.
    """
    directories = [os.path.join(state_dir, name) for name in ("gcroots", "profiles")]
    roots = find(store, list(filter(os.path.isdir, directories)), _report, NIX_MAX_SYMLINKS)
    return [path for path in dict.fromkeys(roots) if _is_valid(store, path)]


def _is_valid(store: Store, path: StorePath) -> bool:
    info = store.path_info(path.hash_part)
    return info is not None and info.path == path


def _report(trouble: str) -> None:
    _log.warning("GC roots: %s", trouble)
