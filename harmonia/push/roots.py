"""Persistent GC roots of pushed paths: symlinks, which the Nix daemon knows as indirect roots.

A root lasts for `push.keep` after the last push or download of its path, which is the modification time of its symlink.
A pinned root lasts until it is dropped. The Nix daemon forgets a root whose symlink is gone.
"""

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store.nix_daemon import BlockingDaemon

_SAME_PUSH_S = 60 * 60.0
"""Age up to which the root of a reference counts as part of the same push, and ends soon: its referrer has a root.

It does not end at once, because a garbage collection that reads the roots meanwhile could find neither.
"""
_INVALID_MAX_AGE_S = 24 * 60 * 60.0
_PIN = ".pin"


@dataclass(frozen=True, slots=True)
class Root:
    path: StorePath
    last_use: float
    """Seconds since the epoch."""
    pinned: bool


class PushRoots:
    """The persistent GC roots of pushed paths, in a directory."""

    def __init__(self, directory: str, store_dir: str, keep_s: float) -> None:
        self._directory = directory
        self._store_dir = store_dir
        self._keep_s = keep_s

    def create(self) -> None:
        """Create the directory. Raises OSError if it cannot be created or written to."""
        os.makedirs(self._directory, 0o700, exist_ok=True)
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self._directory)

    def make(self, path: StorePath) -> str:
        """Make the symlink of a root, or renew it, and return it. The daemon must learn it, and the path be valid.

        The caller must hold a temporary root of the path until then.
        """
        os.makedirs(self._directory, 0o700, exist_ok=True)
        link = self._link(path)
        try:
            os.symlink(f"{self._store_dir}/{path}", link)
        except FileExistsError:
            self.renew(path)
        return link

    def renew(self, path: StorePath) -> None:
        """Let the root of a path last for `push.keep` from now on. Does nothing if it has no root."""
        with suppress(FileNotFoundError):
            os.utime(self._link(path), follow_symlinks=False)

    def end_soon(self, references: Iterable[StorePath]) -> None:
        """Let the roots of references that were just pushed end in an hour, because their referrer has one."""
        if self._keep_s <= _SAME_PUSH_S:
            return
        now = time.time()
        as_if_used = now - self._keep_s + _SAME_PUSH_S
        for link in map(self._link, references):
            with suppress(FileNotFoundError):
                if now - os.lstat(link).st_mtime < _SAME_PUSH_S:
                    os.utime(link, (as_if_used, as_if_used), follow_symlinks=False)

    def pin(self, path: StorePath) -> bool:
        """Let a root last until it is dropped. Return False if the path has no root."""
        if not os.path.lexists(self._link(path)):
            return False
        os.close(os.open(self._link(path) + _PIN, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return True

    def drop(self, path: StorePath) -> bool:
        """Remove the root of a path. Return False if the path has no root."""
        with suppress(FileNotFoundError):
            os.unlink(self._link(path) + _PIN)
        try:
            os.unlink(self._link(path))
        except FileNotFoundError:
            return False
        return True

    def find_all(self) -> list[Root]:
        """Return all roots, the most recently used first."""
        roots = []
        with suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(FormatError, FileNotFoundError):
                    if entry.is_symlink():
                        last_use = entry.stat(follow_symlinks=False).st_mtime
                        roots.append(Root(StorePath(entry.name), last_use, os.path.lexists(entry.path + _PIN)))
        return sorted(roots, key=lambda root: root.last_use, reverse=True)

    def expire(self) -> list[StorePath]:
        """Drop the roots that were not used for `push.keep`, and return their paths."""
        oldest = time.time() - self._keep_s
        expired = [root.path for root in self.find_all() if not root.pinned and root.last_use < oldest]
        for path in expired:
            self.drop(path)
        return expired

    def register(self, daemon: BlockingDaemon) -> None:
        """Register all roots again: a worker may have died before it registered one, or Nix may have lost one.

        Drop those whose path has not become valid within a day: its worker died, and it was not pushed again. Each
        garbage collection of Nix would mention them.
        """
        roots = {f"{self._store_dir}/{root.path}": root for root in self.find_all()}
        valid = daemon.query_valid_paths([*roots])
        daemon.add_indirect_roots(self._link(roots[path].path) for path in valid)
        oldest = time.time() - _INVALID_MAX_AGE_S
        for root in (root for path, root in roots.items() if path not in valid and not root.pinned):
            with suppress(FileNotFoundError):
                if os.lstat(self._link(root.path)).st_mtime < oldest:  # unless it was pushed again meanwhile
                    self.drop(root.path)

    def _link(self, path: StorePath) -> str:
        return os.path.join(self._directory, path)
