"""Lookup of store paths, cached, behind the publish policy."""

import asyncio
import logging
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cachetools import LRUCache

from harmonia.errors import StoreObjectError, StoreUnavailableError
from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey, is_signature
from harmonia.nix.store_path import StorePath
from harmonia.process.single_flight import SingleFlight
from harmonia.server.threads import Threads
from harmonia.store import queries
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Database, Store

if TYPE_CHECKING:
    from concurrent.futures import Future

_MAX_PATHS = 8192  # paths, about 2 KiB each
_CLOSURE_FRESH_S = 1.0  # seconds for which what the roots of a policy need is taken not to have changed
_CLOSURE_MAX_AGE_S = 10.0  # seconds for which a path that was among it may go out without another look

_log = logging.getLogger("harmonia")


@dataclass(frozen=True, slots=True)
class SignedPath:
    """A valid path that the publish policy allows, with all the signatures that its narinfo shows."""

    info: PathInfo
    sigs: tuple[str, ...]


class Paths:
    def __init__(
        self, store: Store, database: str, keys: Sequence[SecretKey], policy: PublishPolicy | None, threads: Threads
    ) -> None:
        """`store` and `policy` are each for one of the `threads`; `keys` are what all paths are signed with."""
        self.policy = policy
        self._store = store
        self._keys = keys
        self._threads = threads
        # For the event loop: it only asks whether anything changed, which costs no disk access, and it never waits.
        self._watch = Database(database, timeout=0)
        self._this_turn: Hashable = None
        self._known: MutableMapping[str, tuple[Hashable, SignedPath]] = LRUCache(_MAX_PATHS)
        self._lookups = SingleFlight()
        self._absent_as_of: Hashable = None
        self._absent: set[str] = set()
        """Hash parts of no path, as of that generation."""
        self._closure = policy.closure if policy is not None else None
        self._refreshing: Future[None] | None = None

    async def lookup_path(self, hash_part: str) -> SignedPath | None:
        """Return the path with this hash part, or None if it does not exist or the publish policy forbids it.

        Every resource must look paths up here. Raises StoreObjectError if its row is malformed; StoreUnavailableError.
        """
        generation = self._generation()
        if self._absent_as_of != generation:
            self._absent_as_of = generation
            self._absent.clear()
        if hash_part in self._absent:
            return None
        seen, known = self._known.get(hash_part, (None, None))
        if known is not None and seen == generation:
            return known if self._closure is None or await self._is_needed(known.info.path) else None
        # A lookup that began before the last change of the database may have missed it, and is not joined.
        query = partial(self._query, hash_part, generation, known)
        found = await self._lookups.run((hash_part, generation), query)
        return found if found is None or self._closure is None or await self._is_needed(found.info.path) else None

    async def _query(self, hash_part: str, generation: Hashable, known: SignedPath | None) -> SignedPath | None:
        """Look the path up in the database, and remember the answer as of `generation`."""
        found = await self._threads.run_db(partial(self._look_up, hash_part, known))
        if found is None:
            self._known.pop(hash_part, None)
            if self._absent_as_of == generation and len(self._absent) < _MAX_PATHS:
                self._absent.add(hash_part)
            return None
        # The generation was taken before the path was read: a change in between makes the next request look again.
        self._known[hash_part] = generation, found
        return found

    async def lookup_usable_path(self, hash_part: str) -> SignedPath | None:
        """Likewise, of a path beside the one that is asked for. None also where its row is of no use."""
        try:
            return await self.lookup_path(hash_part)
        except StoreObjectError:
            return None

    def is_current(self, path: SignedPath) -> bool:
        """Whether `lookup_path` would give the very same just now. False where only a longer look can tell."""
        known = self._known.get(path.info.path.hash_part)
        return self._closure is None and known is not None and known == (self._generation(), path)

    def is_absent(self, hash_part: str) -> bool:
        """Whether it is known that no path has that hash part just now. False where only a longer look can tell."""
        return self._absent_as_of == self._generation() and hash_part in self._absent

    def _generation(self) -> Hashable:
        """That of the database, asked once for all requests that one turn of the event loop finds."""
        if self._this_turn is None:
            try:
                self._this_turn = self._watch.generation()
            except StoreUnavailableError:
                self._this_turn = object()  # equals that of no other turn: ask the thread, which may wait
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self._this_turn

    def _end_turn(self) -> None:
        self._this_turn = None

    async def is_published(self, path: StorePath) -> bool:
        """Return whether a path is valid and the publish policy allows it. Without a policy, return True."""
        if self.policy is None:
            return True
        found = await self.lookup_usable_path(path.hash_part)
        return found is not None and found.info.path == path

    async def is_log_published(self, derivation: StorePath) -> bool:
        """Return whether the log of a derivation may be served: if the derivation or one of its outputs is."""
        if self.policy is None:
            return True
        if self.policy.by_name_alone or not self.policy.permits_name(derivation):
            return self.policy.permits_name(derivation)
        if await self.is_published(derivation):
            return True
        outputs = await self._threads.run_slow_db(lambda store: queries.outputs(store, derivation))
        return any([await self.is_published(output) for output in outputs])

    def publish_filter(self, store: Store) -> Callable[[StorePath], bool] | None:
        """Return a function that tells if a valid path is published, or None if all are. It blocks: for one thread."""
        policy = self.policy
        if policy is None:
            return None
        if self._closure is not None:
            self._closure.refresh(_CLOSURE_FRESH_S)

        def is_published(path: StorePath) -> bool:
            if not policy.permits_name(path) or not (self._closure is None or path in self._closure):
                return False
            try:
                info = store.path_info(path.hash_part)
            except StoreObjectError:
                return False
            return info is not None and policy.permits(info)

        return is_published

    async def _is_needed(self, path: StorePath) -> bool:
        """Return whether a root of the policy needs the path."""
        closure = self._closure
        assert closure is not None  # noqa: S101 (or nobody asks)
        if path in closure and closure.age < _CLOSURE_MAX_AGE_S:
            if closure.age > _CLOSURE_FRESH_S and (self._refreshing is None or self._refreshing.done()):
                self._refreshing = self._threads.closure.submit(closure.refresh, _CLOSURE_FRESH_S)
            return True
        # Perhaps it was added just now, and a client remembers for an hour that it was not there.
        await self._threads.run_with_timeout(self._threads.closure, partial(closure.refresh, _CLOSURE_FRESH_S))
        return path in closure

    def _look_up(self, hash_part: str, known: SignedPath | None) -> SignedPath | None:
        info = self._store.path_info(hash_part)
        if info is None or (known is not None and known.info == info):
            return known if info else None
        if self.policy is not None and not self.policy.permits(info):
            return None
        for sig in info.sigs:
            if not is_signature(sig):
                _log.warning("%s: the stored signature %r is malformed and left out", info.path, sig)
        return SignedPath(info, tuple(narinfo.signatures(info, self._store.store_dir, self._keys)))
