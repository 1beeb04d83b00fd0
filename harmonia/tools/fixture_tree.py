"""Content of a store object as a Python value, and its writer, which sets modes and times as Nix does."""

import hashlib
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harmonia.store import confined, file_reader, tree_reader


@dataclass(frozen=True, slots=True)
class Executable:
    contents: bytes


@dataclass(frozen=True, slots=True)
class Symlink:
    target: str | bytes


@dataclass(frozen=True, slots=True)
class Sparse:
    """File of `size` zero bytes that takes no disk space."""

    size: int


Tree = bytes | Executable | Symlink | Sparse | os.PathLike[str] | Mapping[Any, "Tree"]
"""Content of a store object: a file, a symlink, a copy of a path on disk, or a directory as names and their content.

Names are `str` or `bytes`. The key type is Any, because a Mapping is invariant in its keys."""


def write_tree(tree: Tree, path: bytes) -> tuple[bytes, int]:
    """Write `tree` to `path`, which must not exist. Return the hash and size of its NAR."""
    _write(tree, path)
    _canonicalise(path)
    return _nar_hash(path)


def remove_tree(path: bytes) -> None:
    """Remove the file or directory at `path`, if it exists, including read-only directories."""
    if os.path.isdir(path) and not os.path.islink(path):
        for directory, _, _ in os.walk(path):
            os.chmod(directory, 0o700)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _write(tree: Tree, path: bytes) -> None:
    match tree:
        case bytes():
            with open(path, "xb") as file:
                file.write(tree)
        case Executable(contents):
            _write(contents, path)
            os.chmod(path, 0o755)  # noqa: S103 (an executable needs mode 755)
        case Symlink(target):
            os.symlink(os.fsencode(target), path)
        case Sparse(size):
            with open(path, "xb") as file:
                file.truncate(size)
        case Mapping():
            os.mkdir(path)
            for name, node in tree.items():
                _write(node, os.path.join(path, os.fsencode(name)))
        case _ if os.path.isdir(tree) and not os.path.islink(tree):
            shutil.copytree(tree, os.fsdecode(path), symlinks=True)
        case _:
            shutil.copy(tree, os.fsdecode(path), follow_symlinks=False)


def _canonicalise(path: bytes) -> None:
    """Set modes and times as Nix does (`src/libstore/posix-fs-canonicalise.cc`)."""
    for entry in reversed(list(tree_reader.walk(confined.resolved(path)))):  # content before its directory
        if not stat.S_ISLNK(entry.mode):
            os.chmod(entry.path, 0o555 if entry.mode & stat.S_IXUSR else 0o444)
        os.utime(entry.path, (1, 1), follow_symlinks=False)


def _nar_hash(path: bytes) -> tuple[bytes, int]:
    digest = hashlib.sha256()
    size = 0
    for chunk in file_reader.read(tree_reader.dump(path)):
        digest.update(chunk)
        size += len(chunk)
    return digest.digest(), size
