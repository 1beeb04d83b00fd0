"""Publish policy: which valid store paths are served. All other paths are answered exactly like missing ones.

A path must satisfy each rule that is set: its signers, its name, and whether a GC root needs it. The result of
`PublishPolicy.permits` depends on the path's row in the database alone; `Closure` changes with the roots.
"""

import fnmatch
import json
import logging
import re
import threading
import time
from collections.abc import Collection, Sequence

from harmonia.config.settings import PublishRules
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import gc_roots, queries
from harmonia.store.store import Store

_CLOSURE_MAX_PATHS = 1_000_000  # paths; some 120 bytes each
_REFRESH_COST_FACTOR = 10  # of its time, how much of it a closure is being found again

_ROOT_IDS = "select id from ValidPaths where path in (select value from json_each(?)) order by id"

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
            found = set(gc_roots.find(self._store, self._given, troubles.add))
            paths = json.dumps([f"{self._store.store_dir}/{root}" for root in found])
            for trouble in sorted(troubles - self._troubles):
                _log.warning("publish.gc_roots: %s", trouble)
            self._troubles = troubles
            roots = [number for (number,) in self._store.database.query(_ROOT_IDS, paths)]
            if roots != self._roots:
                self._needed = self._find(found)
                self._roots = roots
            self._looked_at = time.monotonic()
            self._not_before = self._looked_at + _REFRESH_COST_FACTOR * (self._looked_at - began)

    def _find(self, roots: Collection[StorePath]) -> frozenset[str]:
        needed = queries.closure_hash_parts(self._store, roots, _CLOSURE_MAX_PATHS)
        if len(needed) == _CLOSURE_MAX_PATHS:
            _log.error("publish.gc_roots need more than %d paths; those beyond are not served", _CLOSURE_MAX_PATHS)
        return needed


def _patterns(patterns: Sequence[str]) -> "re.Pattern[str]":
    return re.compile("|".join(map(fnmatch.translate, patterns)))
