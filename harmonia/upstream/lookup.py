"""Lookup of paths and NARs in all upstreams: by priority, cached, with single flight for each path."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from harmonia.errors import UpstreamError
from harmonia.metrics.outcome import Outcome
from harmonia.process.request_trace import log
from harmonia.process.single_flight import SingleFlight
from harmonia.upstream.client import Client
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.lookup_cache import CachedLookup, LookupCache
from harmonia.upstream.loop_guard import Via
from harmonia.upstream.nar_name import NarName
from harmonia.upstream.narinfo_cache import NarinfoCache
from harmonia.upstream.plans import Plans, new_memory
from harmonia.upstream.remote_path import RemotePath, fetch_narinfo, request_narinfo
from harmonia.upstream.tasks import Tasks

_PLAN_SHARE = 0.4  # of the bound that a lookup waits for the plan of its path, so that its own answer is not late

_T = TypeVar("_T")
Ask = Callable[[Client, dict[str, str]], Coroutine[Any, Any, _T | None]]
"""Requests a resource from one upstream, with these headers. Raises UpstreamError if that fails."""


class UpstreamPool:
    """All upstreams of a worker."""

    def __init__(
        self,
        clients: Sequence[Client],
        identity: str,
        bound: float,
        failed: FailedNars,
        narinfos: NarinfoCache | None = None,
    ) -> None:
        """Create the pool. A lookup without a response after `bound` seconds is answered with None."""
        self.clients = sorted(clients, key=lambda client: client.settings.priority)
        self.identity = identity
        self._bound = bound
        self._failed = failed
        self._narinfos = narinfos
        self._tasks = Tasks()
        self._plan_memory = new_memory()
        self.plans = {client: self._new_plans(client) for client in clients}
        self._lookup_cache = LookupCache()
        self._running_lookups = SingleFlight()

    def add(self, client: Client) -> None:
        """Ask one more upstream from now on."""
        self.plans[client] = self._new_plans(client)
        self.clients = sorted([*self.clients, client], key=lambda client: client.settings.priority)

    def _new_plans(self, client: Client) -> Plans:
        return Plans(client, self._tasks.spawn, self._plan_memory)

    def start(self) -> None:
        for client in self.clients:
            client.breaker.start(self._bound)

    async def close(self) -> None:
        await self._tasks.stop()
        for client in self.clients:
            await client.close()

    async def lookup_path(self, hash_part: str, via: Via) -> RemotePath | None:
        """Return the path with this hash part from an upstream, or else from the cache, or None if neither has it.

        An upstream must answer within `bound` seconds; a later response is cached for the next lookup.
        The cache has a path if both its narinfo and its NAR are there. Returns None for a request in a loop.
        """
        return (await self.lookup_path_with_outcome(hash_part, via))[0]

    async def lookup_path_with_outcome(self, hash_part: str, via: Via) -> tuple[RemotePath | None, Outcome]:
        """Return the path like `lookup_path`, and where its narinfo comes from."""
        if via.is_loop(self.identity):
            log.debug("the request has passed this server before: upstreams are not asked")
            return None, Outcome.NONE
        if (remembered := self._remembered(hash_part, via)) is not None:
            log.debug("upstreams: remembered that %s", "one has it" if remembered.path else "none has it")
            path, outcome = remembered.path, Outcome.MEMORY
        else:
            path, outcome = await self._ask_within_bound(hash_part, via), Outcome.UPSTREAM
        if path is None and (path := await self.lookup_cached_path(hash_part)) is not None:
            log.debug("the cache has the narinfo and the NAR of an upstream that does not answer")
            outcome = Outcome.DISK
        return path, outcome

    def find_planned(self, hash_part: str) -> RemotePath | None:
        """Return the path that `lookup_path` would return for a client without a request, or None. Does not block."""
        cached = self._lookup_cache.get((hash_part, Via()))
        path = cached.path if cached else self._planned(hash_part)
        return None if path is None or self._is_useless(path, Via()) else path

    def _planned(self, hash_part: str) -> RemotePath | None:
        """Return the path of a plan. All upstreams with a lower priority number are known not to have the path."""
        for _, tier in groupby(self.clients, lambda client: client.settings.priority):
            plans = [self.plans[client] for client in tier]
            if found := next(filter(None, (plan.find(hash_part) for plan in plans)), None):
                return found
            if not all(plan.is_missing(hash_part) for plan in plans):
                break
        return None

    async def lookup_cached_path(self, hash_part: str) -> RemotePath | None:
        """Return a path whose narinfo and NAR are in the cache, or None. Sends no request."""
        return None if self._narinfos is None else await self._narinfos.lookup_path(hash_part)

    def keep_narinfo(self, hash_part: str, via: Via) -> None:
        """Fetch the narinfo of a path into the cache in the background, if it is missing there.

        For a path whose NAR is cached already, because another path with the same content was downloaded.
        """
        if self._narinfos is not None:
            self._tasks.spawn(self._keep_narinfo(self._narinfos, hash_part, via))

    async def _keep_narinfo(self, narinfos: NarinfoCache, hash_part: str, via: Via) -> None:
        if await narinfos.has_narinfo(hash_part):
            return
        remembered = self._remembered(hash_part, via)
        path = await self._ask_within_bound(hash_part, via) if remembered is None else remembered.path
        if path is not None:
            await narinfos.keep(path)

    def _remembered(self, hash_part: str, via: Via) -> CachedLookup | None:
        """Return an earlier lookup that is still valid, or None."""
        # A hit is valid for all requests. A miss is valid only for the same Via, which excludes some upstreams.
        for key in ((hash_part, Via()), (hash_part, via)):
            cached = self._lookup_cache.get(key)
            if cached is not None and not (cached.path and self._is_useless(cached.path, via)):
                return cached
        return None

    async def _ask_within_bound(self, hash_part: str, via: Via) -> RemotePath | None:
        """Ask the upstreams for a path. Return None after `bound` seconds: the result is cached when it arrives."""
        task = self._once((hash_part, via), lambda: self._ask_for_path(hash_part, via))
        done, _ = await asyncio.wait({task}, timeout=self._bound)
        if not done:
            log.debug("no upstream has answered within %g s: answered as missing", self._bound)
        return task.result() if done else None

    async def lookup_nar(self, name: NarName, via: Via, failed: Collection[Client] = ()) -> RemotePath | None:
        """Return a path whose NAR has this name, or else one with the same content and compression.

        The second may be another file: the same NAR, compressed again. Upstreams in `failed` are not asked. The bound
        of `lookup_path` does not apply, because a client that requests a NAR knows that it exists.
        """
        if via.is_loop(self.identity):
            return None
        path = self.find_planned(name.hash_part)
        if path and path.name == name and path.client not in failed:
            return path
        return await asyncio.shield(self._once((name, via, *failed), lambda: self._ask_for_nar(name, via, failed)))

    async def ask_each(self, hash_part: str, via: Via) -> list[tuple[Client, RemotePath | UpstreamError | None]]:
        """Ask all upstreams for a path now, past the cache. Return each with its path, or an error, or None."""

        async def ask(client: Client) -> RemotePath | UpstreamError | None:
            try:
                async with asyncio.timeout(self._bound):
                    return await request_narinfo(client, hash_part, via.headers(self.identity))
            except TimeoutError:
                return UpstreamError(f"no answer within {self._bound:g} s")
            except UpstreamError as error:
                return error.with_traceback(None)

        clients = [] if via.is_loop(self.identity) else self.clients
        return list(zip(clients, await asyncio.gather(*map(ask, clients)), strict=True))

    def mark_failed(self, path: RemotePath) -> None:
        """Remember that the NAR of a path cannot be downloaded: for 30 s, lookups of it skip its upstream."""
        self._lookup_cache.forget((path.info.path.hash_part, Via()))
        self.plans[path.client].forget(path.info.path.hash_part)
        self._failed.add(path.client.id, path.name.key)

    def _is_useless(self, path: RemotePath, via: Via) -> bool:
        """Return True if the request came from the path's upstream, or the NAR's download failed recently."""
        return path.client.identity in via.through or self._failed.has(path.client.id, path.name.key)

    async def first_answer(self, ask: Ask[_T], via: Via, discard: Callable[[_T], object] = lambda _: None) -> _T | None:
        """Return the first result of `ask` other than None, or None if there is none within `bound` seconds.

        `ask` requests the resource from one upstream. `discard` is called with each other result, even a late one.
        """
        if via.is_loop(self.identity):
            return None

        async def first() -> _T | None:
            return (await self._first_result(ask, via, discard))[0]

        task = self._tasks.spawn(first())
        done: set[asyncio.Task[_T | None]] = set()
        try:
            done, _ = await asyncio.wait({task}, timeout=self._bound)
            return task.result() if done else None
        finally:
            if not done:
                task.add_done_callback(partial(_discard, discard))

    async def _first_result(
        self, ask: Ask[_T], via: Via, discard: Callable[[_T], object] = lambda _: None
    ) -> tuple[_T | None, bool]:
        """Return the first result other than None, and True if it is certain: a hit, or a miss of all upstreams.

        Upstreams with the lowest priority number are asked first, all at once. The next ones are asked when these have
        no result, or after a share of the bound. Requests to slower upstreams are not cancelled: a cancelled request
        closes its connection, and the circuit breaker would not see that the upstream is slow.
        """
        clients = [client for client in self.clients if client.identity not in {*via.through, *via.asked}]
        headers = via.headers(self.identity, [client.identity for client in clients])
        tiers = [list(tier) for _, tier in groupby(clients, lambda client: client.settings.priority)]
        running: set[asyncio.Task[_T | None]] = set()
        all_answer = len(clients) == len(self.clients)
        try:
            for tier in tiers:
                running |= {self._tasks.spawn(ask(client, headers)) for client in tier}
                patience = None if tier is tiers[-1] else self._bound / (len(tiers) + 1)
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        while running:
                            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                            failed = {task for task in done if isinstance(task.exception(), UpstreamError)}
                            for task in failed:
                                log.debug("an upstream failed: %s", task.exception())
                            all_answer = all_answer and not failed
                            answers = [task for task in done - failed if task.result() is not None]
                            running |= set(answers[1:])  # discarded below
                            if answers:
                                return answers[0].result(), True
            return None, all_answer
        finally:
            for task in running:
                task.add_done_callback(partial(_discard, discard))

    async def _ask_for_path(self, hash_part: str, via: Via) -> RemotePath | None:
        async def ask(client: Client, headers: dict[str, str]) -> RemotePath | None:
            path = await self._lookup_at(client, hash_part, headers)
            return None if path and self._failed.has(client.id, path.name.key) else path

        path, is_certain = await self._first_result(ask, via)
        if is_certain:
            self._lookup_cache.remember((hash_part, Via() if path else via), path)
        if path and self._narinfos is not None and self.plans[path.client].find(hash_part) is not path:
            self._tasks.spawn(self._narinfos.keep(path))  # the narinfo may have changed
        return path

    async def _lookup_at(self, client: Client, hash_part: str, headers: dict[str, str]) -> RemotePath | None:
        """Return the path at one upstream: from a plan, or else from its narinfo, after which its plan is fetched."""
        plans = self.plans[client]
        path = plans.find(hash_part)
        if path is not None:
            log.debug("%s has it, as a plan of it shows", client.base)
        elif plans.is_missing(hash_part):
            log.debug("%s does not have it, as a plan of it shows", client.base)
        else:
            path = await fetch_narinfo(client, hash_part, headers)
            log.debug("%s %s", client.base, "has it" if path else "does not have it, or it was refused")
            if path is not None:
                await plans.prepare(path, headers, self._bound * _PLAN_SHARE)
        return path

    async def _ask_for_nar(self, name: NarName, via: Via, failed: Collection[Client]) -> RemotePath | None:
        alike: list[RemotePath] = []
        failed_before: list[RemotePath] = []

        async def ask(client: Client, headers: dict[str, str]) -> RemotePath | None:
            if client in failed or not name.may_be_at(client.id):
                return None
            path = await fetch_narinfo(client, name.hash_part, headers)
            if path and (path.name.nar_hash, path.name.compression) == (name.nar_hash, name.compression):
                if self._failed.has(client.id, path.name.key):
                    failed_before.append(path)
                elif path.name == name:
                    return path
                else:
                    alike.append(path)
            return None

        path, _ = await self._first_result(ask, via)
        return path or next(iter(alike + failed_before), None)

    def _once(
        self, question: Hashable, ask: Callable[[], Coroutine[Any, Any, RemotePath | None]]
    ) -> "asyncio.Future[RemotePath | None]":
        """Return the future of a lookup, which all callers with the same `question` share while it runs."""
        return self._running_lookups.start(question, lambda: self._tasks.spawn(ask()))


def _discard(discard: Callable[[_T], object], task: "asyncio.Task[_T | None]") -> None:
    if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
        discard(answer)
