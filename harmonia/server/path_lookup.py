"""Lookup of store paths, cached, behind the publish policy."""

import asyncio
import logging
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

from cachetools import LRUCache

from harmonia.errors import StoreObjectError, StoreUnavailableError
from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath
from harmonia.process import request_trace
from harmonia.process.single_flight import SingleFlight
from harmonia.process.threads import Threads
from harmonia.server.absent_paths import AbsentPaths
from harmonia.store import queries
from harmonia.store.new_paths import NewPaths
from harmonia.store.publish_policy import CLOSURE_FRESH_S, PublishPolicy
from harmonia.store.store import PathRow, Store

if TYPE_CHECKING:
    from concurrent.futures import Future

_MAX_PATHS = 8192  # cached paths, about 2 KiB each
_CLOSURE_MAX_AGE_S = 10.0  # age up to which a path of the closure may be served before the closure is refreshed

_log = logging.getLogger("harmonia")


class Unknown(Enum):
    UNKNOWN = 0


UNKNOWN: Final = Unknown.UNKNOWN
"""Result of a lookup that has to be made by a thread."""


@dataclass(frozen=True, slots=True)
class SignedPath:
    """A valid path that the publish policy allows, with all signatures for its narinfo: stored ones and ours."""

    info: PathInfo
    sigs: tuple[str, ...]


@dataclass(slots=True)
class _CachedPath:
    path: SignedPath | None
    """None if the publish policy forbids the path."""
    row: PathRow
    generation: Hashable
    """The generation of the database as of which the path has this row."""


class Paths:
    """Cached lookups of published paths, on one event loop."""

    def __init__(
        self, store: Store, database: str, keys: Sequence[SecretKey], policy: PublishPolicy | None, threads: Threads
    ) -> None:
        """Create the lookup. `store` is used in one of the `threads`, `policy` in several. `keys` sign all paths."""
        self.policy = policy
        self._store = store
        self._keys = keys
        self._threads = threads
        # For the event loop, which never waits for a lock of the database.
        self._loop_store = Store(store.store_dir, store.real_dir, database, timeout=0)
        self._this_turn: Hashable = None
        self._cache: MutableMapping[str, _CachedPath] = LRUCache(_MAX_PATHS)
        self._lookups = SingleFlight()
        self.rows_read = 0
        """The number of rows read on the event loop that were new or had changed."""
        self._absent = AbsentPaths(NewPaths(self._loop_store, database), threads.loop_db)
        self._closure = policy.closure if policy is not None else None
        self._refreshing: Future[None] | None = None

    async def lookup_path(self, hash_part: str) -> SignedPath | None:
        """Return the path with this hash part, or None if it does not exist or the publish policy forbids it.

        Every resource must look paths up here. Raises StoreObjectError if the path's row in the database is malformed,
        StoreUnavailableError if the database does not answer in time.
        """
        path = self._lookup_ignoring_closure(hash_part)
        if isinstance(path, Unknown):
            generation = self._generation()
            # A lookup that began before the last change of the database may have missed it: start a new one.
            path = await self._lookups.run(
                (hash_part, generation), partial(self._lookup_in_thread, hash_part, generation)
            )
        if path is not None and self._closure is not None and not await self._is_in_closure(path.info.path):
            path = None
        if request_trace.is_on():
            await self._trace(hash_part, path)
        return path

    async def _trace(self, hash_part: str, path: SignedPath | None) -> None:
        """Log the result of a lookup, and if there is none, whether a rule forbids the path."""
        if path is not None:
            request_trace.log.debug("%s is valid, and may be served", path.info.path)
            return
        info = await self._threads.run_slow_db(lambda store: store.usable_path_info(hash_part))
        if info is None:
            request_trace.log.debug("no valid path has the hash %s", hash_part)
        elif self.policy is not None:
            denial = await self._threads.run_slow_db(lambda _: self.policy and self.policy.denial(info))
            request_trace.log.debug("%s may not be served: %s", info.path, denial)

    def lookup_now(self, hash_part: str) -> SignedPath | Unknown | None:
        """Return the result of `lookup_path`, or UNKNOWN if a thread has to look. Does not block.

        Returns the same object until the row of the path changes, as long as the path is cached.
        Raises StoreObjectError like `lookup_path`.
        """
        path = self._lookup_ignoring_closure(hash_part)
        return path if path is None or self._closure is None else UNKNOWN

    def _lookup_ignoring_closure(self, hash_part: str) -> SignedPath | Unknown | None:
        """Return the result of `lookup_now` as if the publish policy had no closure."""
        generation = self._generation()
        absent = self._absent
        if absent.generation != generation or monotonic() >= absent.expires:
            absent.renew(generation)
        if hash_part in absent.hash_parts:
            return None
        cached: _CachedPath | None
        try:
            cached = self._cache[hash_part]  # takes two thirds of the time of `get`
        except KeyError:
            cached = None
        if cached is not None and cached.generation == generation:
            return cached.path
        if not self._threads.loop_db.allowed:
            return UNKNOWN
        try:
            found = self._threads.loop_db.run(partial(self._read_path, self._loop_store, hash_part, cached, generation))
        except StoreUnavailableError:  # perhaps only busy: a thread waits
            return UNKNOWN
        if found is not None and (cached is None or cached.path is not found.path):
            self.rows_read += 1
        return self._cache_result(hash_part, generation, found)

    async def _lookup_in_thread(self, hash_part: str, generation: Hashable) -> SignedPath | None:
        """Look the path up in a thread, and cache the result as of `generation`."""
        cached = self._cache.get(hash_part)
        found = await self._threads.run_db(partial(self._read_path, self._store, hash_part, cached, generation))
        return self._cache_result(hash_part, generation, found)

    def _cache_result(self, hash_part: str, generation: Hashable, found: _CachedPath | None) -> SignedPath | None:
        """Cache the result of a lookup. Return its path.

        `generation` was read before the path: after a change in between, the next request looks the path up again.
        """
        if found is not None:
            self._cache[hash_part] = found
            return found.path
        self._cache.pop(hash_part, None)
        self._absent.add(hash_part, generation)
        return None

    def _read_path(
        self, store: Store, hash_part: str, cached: _CachedPath | None, generation: Hashable
    ) -> _CachedPath | None:
        """Read the path from `store`, as of `generation`. Keep the path of `cached` if its row is the same."""
        row = store.path_row(hash_part, as_of_generation=store is self._loop_store)
        if row is None:
            return None
        if cached is not None and cached.row == row:
            return _CachedPath(cached.path, row, generation)
        info = store.parse_row(row)
        if self.policy is not None and not self.policy.permits(info):
            return _CachedPath(None, row, generation)
        for sig in info.sigs:
            if not is_signature(sig):
                _log.warning("%s: skipping a stored signature: %r is malformed; sign the path again", info.path, sig)
        path = SignedPath(info, tuple(narinfo.signatures(info, self._store.store_dir, self._keys)))
        return _CachedPath(path, row, generation)

    async def lookup_usable_path(self, hash_part: str) -> SignedPath | None:
        """Like `lookup_path`, but return None if the row is malformed. For paths that the response only mentions."""
        try:
            return await self.lookup_path(hash_part)
        except StoreObjectError:
            return None

    async def lookup_valid_path(self, hash_part: str) -> PathInfo | None:
        """Like `lookup_path`, but even of a path that the publish policy forbids: only for pushers."""
        found = self.lookup_valid_now(hash_part)
        return (
            await self._threads.run_db(partial(self._store.path_info, hash_part))
            if isinstance(found, Unknown)
            else found
        )

    def lookup_valid_now(self, hash_part: str) -> PathInfo | Unknown | None:
        """Return the result of `lookup_valid_path`, or UNKNOWN if a thread has to look. Does not block."""
        if self._threads.loop_db.allowed:
            with suppress(StoreUnavailableError):  # perhaps only busy: a thread waits
                return self._threads.loop_db.run(partial(self._loop_store.path_info, hash_part))
        return UNKNOWN

    def remembered(self, hash_part: str) -> SignedPath | None:
        """Return the path that a lookup has left in memory, or None. The row of the path may have changed since.

        If it has not, the next lookup returns the same object.
        """
        cached = self._cache.get(hash_part)
        return None if cached is None else cached.path

    def is_current(self, path: SignedPath) -> bool:
        """Return True if `lookup_path` would certainly return the same path now. Does not block.

        Returns False if a thread must look it up, if the policy has gc_roots, or if the row is malformed.
        """
        try:
            return self.lookup_now(path.info.path.hash_part) == path
        except StoreObjectError:
            return False

    def is_absent(self, hash_part: str) -> bool:
        """Return True if it is certain that no path has this hash part now. Return False if a thread must look."""
        try:
            return self._lookup_ignoring_closure(hash_part) is None
        except StoreObjectError:
            return False

    def _generation(self) -> Hashable:
        """Return the generation of the database, read once for each turn of the event loop."""
        if self._this_turn is None:
            try:
                self._this_turn = self._loop_store.database.generation()
            except StoreUnavailableError:
                self._this_turn = object()  # unequal to all others, so the next lookup queries the database
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self._this_turn

    def _end_turn(self) -> None:
        self._this_turn = None

    async def is_published(self, path: StorePath) -> bool:
        """Return True if a path is valid and the publish policy allows it.

        Without a policy, returns True for every path, valid or not.
        """
        if self.policy is None:
            return True
        signed = await self.lookup_usable_path(path.hash_part)
        return signed is not None and signed.info.path == path

    async def is_log_published(self, derivation: StorePath) -> bool:
        """Return True if the log of a derivation may be served: if the derivation or one of its outputs may be."""
        if self.policy is None:
            return True
        if self.policy.by_name_alone or not self.policy.permits_name(derivation):
            return self.policy.permits_name(derivation)
        if await self.is_published(derivation):
            return True
        outputs = await self._threads.run_slow_db(lambda store: queries.outputs(store, derivation))
        return any([await self.is_published(output) for output in outputs])

    def publish_filter(self, store: Store) -> Callable[[StorePath], bool] | None:
        """Return a function that returns whether a valid path is published, or None if all are.

        Both block, and must run in the thread of `store`.
        """
        return self.policy.published_filter(store) if self.policy is not None else None

    async def _is_in_closure(self, path: StorePath) -> bool:
        """Return True if the path is in the closure of the policy's roots."""
        closure = self._closure
        assert closure is not None  # noqa: S101 (callers check this)
        if path in closure and closure.age < _CLOSURE_MAX_AGE_S:
            if closure.age > CLOSURE_FRESH_S and (self._refreshing is None or self._refreshing.done()):
                self._refreshing = self._threads.closure.submit(closure.refresh, CLOSURE_FRESH_S)
            return True
        # The path may be new. Nix caches a 404 for an hour, so refresh the closure first.
        await self._threads.run_with_timeout(self._threads.closure, partial(closure.refresh, CLOSURE_FRESH_S))
        return path in closure
