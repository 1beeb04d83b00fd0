"""Publish policy: which valid store paths are served. All other paths are answered exactly like missing ones.

A path must satisfy each rule that is set: its signers, its name, and whether a GC root needs it. The result of
`PublishPolicy.permits` depends on the path's row in the database alone; `Closure` changes with the roots.
"""

import fnmatch
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence

from harmonia.config.settings import PublishRules
from harmonia.errors import FormatError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store

_MAX_SYMLINKS = 16  # symlinks from a root to its store path: a profile has two
_MAX_ROOTS = 100_000  # entries of the directories with roots
_CLOSURE_MAX_PATHS = 1_000_000  # paths; some 120 bytes each
_REFRESH_COST_FACTOR = 10  # of its time, how much of it a closure is being found again

_ROOT_IDS = "select id from ValidPaths where path in (select value from json_each(?)) order by id"
_NEEDED = """
with recursive needed(id) as (
  select value from json_each(?)
  union select reference from Refs join needed on referrer = needed.id limit ?)
select substr(path, ?, 32) from needed join ValidPaths using (id)
"""

_log = logging.getLogger("harmonia")


class PublishPolicy:
    """The rules, for any thread. The methods block."""

    def __init__(self, rules: PublishRules, store: Store) -> None:
        """`store` is for this alone. Nothing is opened yet, so that the process may still fork."""
        self._store_dir = store.store_dir
        self._keys = rules.public_keys
        self._allow = _patterns(rules.allow) if rules.allow else None
        self._deny = _patterns(rules.deny) if rules.deny else None
        self.by_name_alone = not (rules.signed_by or rules.gc_roots)
        self.closure = Closure(store, rules.gc_roots) if rules.gc_roots else None

    def permits_name(self, path: StorePath) -> bool:
        """Return whether the rules for names allow a path. A derivation is also matched without its suffix .drv."""
        names = {path.name, path.name.removesuffix(".drv")}
        if self._deny is not None and any(map(self._deny.fullmatch, names)):
            return False
        return self._allow is None or any(map(self._allow.fullmatch, names))

    def permits(self, info: PathInfo) -> bool:
        """Return whether all rules but gc_roots allow a path."""
        return self.permits_name(info.path) and (not self._keys or self._is_signed(info))

    def _is_signed(self, info: PathInfo) -> bool:
        """Return whether a signature in the database is by one of the keys. Our own keys sign all that is served."""
        fingerprint = info.fingerprint(self._store_dir)
        return any(key.verify(fingerprint, sig) for key in self._keys for sig in info.sigs)


class Closure:
    """All that the roots need, as it was not long ago. One thread at a time finds it anew; any may ask."""

    def __init__(self, store: Store, roots: Sequence[str]) -> None:
        self._store = store
        self._given = roots
        self._lock = threading.Lock()
        self._needed: frozenset[str] = frozenset()
        self._roots: Sequence[int] | None = None
        self._troubles: set[str] = set()
        self._looked_at = -float("inf")
        self._not_before = 0.0

    def __contains__(self, path: StorePath) -> bool:
        return path.hash_part in self._needed

    @property
    def age(self) -> float:
        """Seconds since we looked whether it is still right."""
        return time.monotonic() - self._looked_at

    def refresh(self, age: float = 0.0) -> None:
        """Look whether it is still right, unless that was done less than `age` seconds ago, and find it anew if not.

        StoreUnavailableError; then it stays as it was.
        """
        with self._lock:
            began = time.monotonic()
            if self.age <= age or began < self._not_before:
                return
            # A path that is valid has the same references as long as its row, and so have those that it needs: Nix
            # deletes none that another refers to. So the rows of the roots tell whether anything changed.
            troubles: set[str] = set()
            paths = json.dumps([f"{self._store.store_dir}/{root}" for root in set(self._found(troubles))])
            for trouble in sorted(troubles - self._troubles):
                _log.warning("publish.gc_roots: %s", trouble)
            self._troubles = troubles
            roots = [number for (number,) in self._store.database.query(_ROOT_IDS, paths)]
            if roots != self._roots:
                self._needed = self._find(roots)
                self._roots = roots
            self._looked_at = time.monotonic()
            self._not_before = self._looked_at + _REFRESH_COST_FACTOR * (self._looked_at - began)

    def _find(self, roots: Sequence[int]) -> frozenset[str]:
        rows = self._store.database.query(
            _NEEDED, json.dumps(roots), _CLOSURE_MAX_PATHS, len(self._store.store_dir) + 2
        )
        if len(rows) == _CLOSURE_MAX_PATHS:
            _log.error("publish.gc_roots need more than %d paths; those beyond are not served", _CLOSURE_MAX_PATHS)
        return frozenset(hash_part for (hash_part,) in rows)

    def _found(self, troubles: set[str]) -> Iterator[StorePath]:
        """The store paths of the roots. As in Nix's own search (`src/libstore/gc.cc`, `findRoots`), a symlink in a
        directory may lead to a store path, but to no other directory.
        """
        left = _MAX_ROOTS
        waiting = list(self._given)
        while waiting and left:
            left -= 1
            name = waiting.pop()
            try:
                path = self._followed(name)
                if isinstance(path, StorePath):
                    yield path
                elif stat.S_ISDIR(os.lstat(path).st_mode) and (path == name or name in self._given):
                    with os.scandir(path) as entries:
                        waiting += (entry.path for entry in entries)
            except FileNotFoundError:
                if name in self._given:
                    troubles.add(f"there is no {name!r} any more")
            except (OSError, FormatError) as error:
                troubles.add(f"{name!r} is no root: {getattr(error, 'strerror', None) or error}")
        if waiting:
            troubles.add(f"there are more than {_MAX_ROOTS} entries; those beyond are left out")

    def _followed(self, name: str) -> StorePath | str:
        """The store path that a root leads to; else where it leads on disk. What the store has is not followed on."""
        inside = tuple(f"{directory}/" for directory in (self._store.store_dir, self._store.real_dir))
        for _ in range(_MAX_SYMLINKS):
            name = os.path.normpath(name)
            for directory in inside:
                if name.startswith(directory):
                    return StorePath(name.removeprefix(directory).partition("/")[0])
            if not os.path.islink(name):
                return name
            name = os.path.join(os.path.dirname(name), os.readlink(name))
        raise FormatError("too many symlinks")


def _patterns(patterns: Sequence[str]) -> "re.Pattern[str]":
    return re.compile("|".join(map(fnmatch.translate, patterns)))
