"""What a store object holds, as a value, and how it is put on disk as Nix leaves it."""

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
    """A file of `size` zeros that takes no space."""

    size: int


Tree = bytes | Executable | Symlink | Sparse | os.PathLike[str] | Mapping[Any, "Tree"]
"""What a store object holds: a file, a symlink, a copy of what is on disk at a path, or a directory by its names, `str`
or `bytes` (which a Mapping, invariant in its keys, cannot say)."""


def write_tree(tree: Tree, path: bytes) -> tuple[bytes, int]:
    """Write `tree` to `path`, where nothing is. Return the hash and the size of its NAR."""
    _write(tree, path)
    _canonicalise(path)
    return _nar_hash(path)


def remove_tree(path: bytes) -> None:
    """Remove what is at `path`, if anything, read-only directories too."""
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
            os.chmod(path, 0o755)  # noqa: S103 (it is executable)
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
    """Modes and times as Nix gives them (`src/libstore/posix-fs-canonicalise.cc`)."""
    for entry in reversed(list(tree_reader.walk(confined.resolved(path)))):  # a directory after what is in it
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
