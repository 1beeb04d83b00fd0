"""What all upstreams together know of a path. Each question is asked once, however many want to know."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from harmonia.errors import UpstreamError
from harmonia.process.single_flight import SingleFlight
from harmonia.upstream.client import Client
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.lookup_cache import LookupCache
from harmonia.upstream.loop_guard import Via
from harmonia.upstream.nar_name import NarName
from harmonia.upstream.narinfo_cache import NarinfoCache
from harmonia.upstream.remote_path import RemotePath, fetch_narinfo
from harmonia.upstream.tasks import Tasks

_T = TypeVar("_T")
Ask = Callable[[Client, dict[str, str]], Coroutine[Any, Any, _T | None]]
"""Asks one upstream something, with these headers. UpstreamError where it fails."""


class UpstreamPool:
    def __init__(
        self,
        clients: Sequence[Client],
        identity: str,
        bound: float,
        failed: FailedNars,
        narinfos: NarinfoCache | None = None,
    ) -> None:
        """`bound` is after how many seconds a question is answered with no, whoever has yet to answer."""
        self.clients = sorted(clients, key=lambda client: client.settings.priority)
        self.identity = identity
        self._bound = bound
        self._failed = failed
        self._narinfos = narinfos
        self._lookup_cache = LookupCache()
        self._asking = SingleFlight()
        self._tasks = Tasks()

    def start(self) -> None:
        for client in self.clients:
            client.breaker.start(self._bound)

    async def close(self) -> None:
        await self._tasks.stop()
        for client in self.clients:
            await client.close()

    async def lookup_path(self, hash_part: str, via: Via) -> RemotePath | None:
        """Who has the path with that hash part. None also where nobody has told in time: then the next may hear it.

        If no upstream has it, or none answers, a path whose narinfo and NAR are in the cache is found there.
        """
        if via.is_loop(self.identity):
            return None
        return await self._lookup_remote(hash_part, via) or await self.lookup_cached_path(hash_part)

    async def lookup_cached_path(self, hash_part: str) -> RemotePath | None:
        """Return a path whose narinfo and NAR are in the cache, without asking any upstream."""
        return None if self._narinfos is None else await self._narinfos.lookup_path(hash_part)

    def keep_narinfo(self, hash_part: str, via: Via) -> None:
        """Have the narinfo of a path in the cache, too, whose NAR is: it came with another path of the same content."""
        if self._narinfos is not None:
            self._tasks.spawn_shared(self._keep_narinfo(self._narinfos, hash_part, via))

    async def _keep_narinfo(self, narinfos: NarinfoCache, hash_part: str, via: Via) -> None:
        if not await narinfos.has_narinfo(hash_part) and (found := await self._lookup_remote(hash_part, via)):
            await narinfos.keep(found)

    async def _lookup_remote(self, hash_part: str, via: Via) -> RemotePath | None:
        # Who has it has it for all. Who has not may have been kept from asking others, by the way the question came.
        for key in ((hash_part, Via()), (hash_part, via)):
            known = self._lookup_cache.get(key)
            if known is not None and not (known.found and self._is_useless(known.found, via)):
                return known.found
        task = self._once((hash_part, via), lambda: self._ask_for_path(hash_part, via))
        done, _ = await asyncio.wait({task}, timeout=self._bound)
        return task.result() if done else None

    async def lookup_nar(self, name: NarName, via: Via, failed: Collection[Client] = ()) -> RemotePath | None:
        """Who has the NAR of that name, or one like it: packed anew, perhaps, but in the same compression.

        Nobody who has failed. This takes its time: a client that asks for a NAR knows that there is one.
        """
        if via.is_loop(self.identity):
            return None
        known = self._lookup_cache.get((name.hash_part, Via()))
        found = known.found if known else None
        if found and found.name == name and found.client not in failed and not self._is_useless(found, Via()):
            return found
        return await asyncio.shield(self._once((name, via, *failed), lambda: self._ask_for_nar(name, via, failed)))

    def mark_failed(self, found: RemotePath) -> None:
        """Its NAR cannot be had: for a moment, nothing is said of the path that only this upstream says."""
        self._lookup_cache.forget((found.info.path.hash_part, Via()))
        self._failed.add(found.client.id, found.name.key)

    def _is_useless(self, found: RemotePath, via: Via) -> bool:
        """Return whether the upstream asks us, or its NAR could not be had."""
        return found.client.identity in via.through or self._failed.has(found.client.id, found.name.key)

    async def first_answer(self, ask: Ask[_T], via: Via, discard: Callable[[_T], object] = lambda _: None) -> _T | None:
        """The first answer of all upstreams, within the bound. What comes later, or second, is discarded."""
        if via.is_loop(self.identity):
            return None

        async def first() -> _T | None:
            return (await self._first(ask, via, discard))[0]

        task = self._tasks.spawn(first())
        done: set[asyncio.Task[_T | None]] = set()
        try:
            done, _ = await asyncio.wait({task}, timeout=self._bound)
            return task.result() if done else None
        finally:
            if not done:
                task.add_done_callback(partial(_discard, discard))

    async def _first(
        self, ask: Ask[_T], via: Via, discard: Callable[[_T], object] = lambda _: None
    ) -> tuple[_T | None, bool]:
        """The first answer of all upstreams, and whether all have answered that were to be asked.

        Those of the lowest priority are asked first, all at once; others when these have no answer, or keep us waiting.
        Whoever is slower is still heard out: else its connection had to be closed, and its slowness went unnoticed.
        """
        clients = [client for client in self.clients if client.identity not in {*via.through, *via.asked}]
        headers = via.headers(self.identity, [client.identity for client in clients])
        tiers = [list(tier) for _, tier in groupby(clients, lambda client: client.settings.priority)]
        running: set[asyncio.Task[_T | None]] = set()
        sure = len(clients) == len(self.clients)
        try:
            for tier in tiers:
                running |= {self._tasks.spawn(ask(client, headers)) for client in tier}
                patience = None if tier is tiers[-1] else self._bound / (len(tiers) + 1)
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        while running:
                            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                            failed = {task for task in done if isinstance(task.exception(), UpstreamError)}
                            sure = sure and not failed
                            answers = [task for task in done - failed if task.result() is not None]
                            running |= set(answers[1:])  # to be discarded
                            if answers:
                                return answers[0].result(), True
            return None, sure
        finally:
            for task in running:
                task.add_done_callback(partial(_discard, discard))

    async def _ask_for_path(self, hash_part: str, via: Via) -> RemotePath | None:
        async def ask(client: Client, headers: dict[str, str]) -> RemotePath | None:
            found = await fetch_narinfo(client, hash_part, headers)
            return None if found and self._failed.has(client.id, found.name.key) else found

        found, sure = await self._first(ask, via)
        if found or sure:
            self._lookup_cache.remember((hash_part, Via() if found else via), found)
        if found and self._narinfos is not None:
            self._tasks.spawn_shared(self._narinfos.keep(found))  # it may have changed
        return found

    async def _ask_for_nar(self, name: NarName, via: Via, failed: Collection[Client]) -> RemotePath | None:
        alike: list[RemotePath] = []
        failed_before: list[RemotePath] = []

        async def ask(client: Client, headers: dict[str, str]) -> RemotePath | None:
            if client in failed or not name.may_be_at(client.id):
                return None
            found = await fetch_narinfo(client, name.hash_part, headers)
            if found and (found.name.nar_hash, found.name.compression) == (name.nar_hash, name.compression):
                if self._failed.has(client.id, found.name.key):
                    failed_before.append(found)
                elif found.name == name:
                    return found
                else:
                    alike.append(found)
            return None

        found, _ = await self._first(ask, via)
        return found or next(iter(alike + failed_before), None)

    def _once(
        self, question: Hashable, ask: Callable[[], Coroutine[Any, Any, RemotePath | None]]
    ) -> "asyncio.Future[RemotePath | None]":
        """The answer to a question that is asked once at a time, however many want to know."""
        return self._asking.start(question, lambda: self._tasks.spawn(ask()))


def _discard(discard: Callable[[_T], object], task: "asyncio.Task[_T | None]") -> None:
    if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
        discard(answer)
