"""Publish policy: which valid store paths are served. All other paths are answered exactly like missing ones.

A path must satisfy each rule that is set: its signers, its name, and whether a GC root needs it. The result of
`PublishPolicy.permits` depends on the path's row in the database alone; `Closure` changes with the roots.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from harmonia.config.name_patterns import compile_patterns
from harmonia.config.settings import Settings
from harmonia.config.tables.publish import PublishRules
from harmonia.errors import StoreObjectError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import gc_roots, queries
from harmonia.store.store import Store

CLOSURE_FRESH_S = 1.0
"""Age in seconds up to which the closure of the roots is not refreshed."""
_CLOSURE_MAX_PATHS = 1_000_000  # some 120 bytes of memory each
_REFRESH_COST_FACTOR = 10  # minimum pause after a refresh, in multiples of the refresh's duration

_ROOT_IDS = "select id from ValidPaths where path in (select value from json_each(?)) order by id"

_log = logging.getLogger("harmonia")


class PublishPolicy:
    """The publish rules. Thread-safe. The methods block."""

    @classmethod
    def of(cls, settings: Settings) -> "PublishPolicy | None":
        """Return the policy of the settings, with a store of its own, or None without rules."""
        return cls(settings.publish, Store.of(settings)) if settings.publish != PublishRules() else None

    def __init__(self, rules: PublishRules, store: Store) -> None:
        """Open nothing yet, so that the process may still fork. No other code may use `store`."""
        self._store_dir = store.store_dir
        self._rules = rules
        self._keys = rules.public_keys
        self._allow = compile_patterns(rules.allow) if rules.allow else None
        self._deny = compile_patterns(rules.deny) if rules.deny else None
        self.by_name_alone = not (rules.signed_by or rules.gc_roots)
        self.closure = Closure(store, rules.gc_roots) if rules.gc_roots else None

    def permits_name(self, path: StorePath) -> bool:
        """Return True if the rules for names allow a path. A derivation is also matched without its suffix .drv."""
        names = _names(path)
        if self._deny is not None and any(map(self._deny.fullmatch, names)):
            return False
        return self._allow is None or any(map(self._allow.fullmatch, names))

    def permits(self, info: PathInfo) -> bool:
        """Return True if all rules except gc_roots allow a path."""
        return self.permits_name(info.path) and (not self._keys or self._is_signed(info))

    def denial(self, info: PathInfo) -> str | None:
        """Return the rule that forbids a path, in words, or None if all rules allow it. Refreshes the closure."""
        if not self.permits_name(info.path):
            names = _names(info.path)
            denied = [rule for rule in self._rules.deny if any(map(compile_patterns([rule]).fullmatch, names))]
            if denied:
                return f'"{denied[0]}" of publish.deny matches its name'
            return "no pattern of publish.allow matches its name"
        if self._keys and not self._is_signed(info):
            return "publish.signed_by requires a signature that it does not have in the database"
        if self.closure is not None:
            self.closure.refresh()
            if info.path not in self.closure:
                return "no GC root of publish.gc_roots needs it"
        return None

    def published_filter(self, store: Store) -> Callable[[StorePath], bool]:
        """Return a function that returns whether a valid path is published now.

        Both block, and must run in the thread of `store`. Raises StoreUnavailableError if a database cannot be read.
        """
        closure = self.closure
        if closure is not None:
            closure.refresh(CLOSURE_FRESH_S)

        def is_published(path: StorePath) -> bool:
            if not self.permits_name(path) or not (closure is None or path in closure):
                return False
            try:
                info = store.path_info(path.hash_part)
            except StoreObjectError:
                return False
            return info is not None and self.permits(info)

        return is_published

    def _is_signed(self, info: PathInfo) -> bool:
        """Return True if a signature in the database is by one of the keys. Our own signatures are not in it."""
        fingerprint = info.fingerprint(self._store_dir)
        return any(key.verify(fingerprint, sig) for key in self._keys for sig in info.sigs)


def _names(path: StorePath) -> set[str]:
    """Return the names that the patterns may match."""
    return {path.name, path.name.removesuffix(".drv")}


class Closure:
    """The hash parts of the closure of the GC roots, as of the last refresh. Thread-safe."""

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
        """Return the seconds since the last refresh."""
        return time.monotonic() - self._looked_at

    def refresh(self, age: float = 0.0) -> None:
        """Compute the closure again if the roots have changed and the last refresh is over `age` seconds ago.

        Also does nothing for some time after a refresh, longer if that was slow.
        Raises StoreUnavailableError if the database cannot be read; the closure then stays as it was.
        """
        with self._lock:
            began = time.monotonic()
            if self.age <= age or began < self._not_before:
                return
            # References of a row never change, and Nix does not delete a path that another path refers to. So the
            # closure is the same as long as the rows of the roots are the same.
            troubles: set[str] = set()
            root_paths = set(gc_roots.find(self._store, self._given, troubles.add))
            paths = json.dumps([f"{self._store.store_dir}/{path}" for path in root_paths])
            for trouble in sorted(troubles - self._troubles):
                _log.warning("publish.gc_roots: %s", trouble)
            self._troubles = troubles
            roots = [number for (number,) in self._store.database.query(_ROOT_IDS, paths)]
            if roots != self._roots:
                self._needed = self._needed_hash_parts(root_paths)
                self._roots = roots
            self._looked_at = time.monotonic()
            self._not_before = self._looked_at + _REFRESH_COST_FACTOR * (self._looked_at - began)

    def _needed_hash_parts(self, roots: Collection[StorePath]) -> frozenset[str]:
        needed = queries.closure_hash_parts(self._store, roots, _CLOSURE_MAX_PATHS)
        if len(needed) == _CLOSURE_MAX_PATHS:
            _log.error(
                "publish.gc_roots: the closure has more than %d paths; the others are not served", _CLOSURE_MAX_PATHS
            )
        return needed
