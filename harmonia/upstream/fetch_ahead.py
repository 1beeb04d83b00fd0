"""NARs that a client will want next, fetched into the cache before it asks for them.

A client that asks for the narinfo of a path, and then for the NAR of any path, wants the NARs of both: Nix asks for
narinfos of missing paths only. It fetches NARs one after the other (up to 2.15), or 16 at once, each after a round
trip. Here, they are fetched over a few connections in the order of their plan, which is that of Nix: references first.
"""

import asyncio
import heapq
from collections.abc import Callable, Mapping

from harmonia.config import amounts
from harmonia.upstream.client import Client
from harmonia.upstream.fetch import NarFetcher
from harmonia.upstream.plans import Plans
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.tasks import Tasks

_CONNECTIONS = 16  # to one upstream
_MAX_WANTED = 10_000  # paths whose narinfo a client has asked for; further ones are not fetched ahead
_IDLE_S = 30.0  # without a request for a NAR: no more NARs are fetched ahead
_UNCLAIMED_S = 120.0  # after the last request for a NAR, those that no client has asked for are removed


class FetchAhead:
    """The NARs that are fetched ahead from one upstream, on one event loop."""

    def __init__(
        self, client: Client, plans: Plans, fetcher: NarFetcher, tasks: Tasks, headers: Callable[[], Mapping[str, str]]
    ) -> None:
        """Create a pipeline, which `wanted` and `requested` drive. `headers` returns those of our own requests."""
        self._budget = amounts.size(client.settings.fetch_ahead) if client.settings.mode == "proxy" else 0
        self._plans = plans
        self._fetcher = fetcher
        self._tasks = tasks
        self._headers = headers
        self._wanted: set[str] = set()
        self._queue: list[tuple[int, str]] = []
        self._unclaimed: dict[str, tuple[str, int]] = {}
        """Key in the cache and size in bytes of each NAR that was fetched ahead, by hash part."""
        self._unclaimed_bytes = 0
        self._fetching = 0
        self._last_request = 0.0
        self._cleaner: asyncio.Task[None] | None = None

    def wanted(self, path: RemotePath) -> None:
        """Note that a client has asked for the narinfo of a path."""
        hash_part = path.info.path.hash_part
        position = self._plans.position(hash_part)
        if not self._budget or position is None or len(self._wanted) >= _MAX_WANTED:
            return
        if hash_part in self._wanted or hash_part in self._unclaimed:
            return
        self._wanted.add(hash_part)
        heapq.heappush(self._queue, (position, hash_part))
        if self._is_active():
            self._fill()

    def requested(self, hash_part: str) -> None:
        """Note that a client requests the NAR of a path. Fetch others ahead from now on, while clients come."""
        self._wanted.discard(hash_part)
        self._release(hash_part)
        if not self._budget or self._plans.position(hash_part) is None:
            return
        self._last_request = asyncio.get_running_loop().time()
        self._fill()

    def _claim(self, path: RemotePath, size: int) -> None:
        self._unclaimed[path.info.path.hash_part] = path.name.key, size
        self._unclaimed_bytes += size

    def _release(self, hash_part: str) -> None:
        self._unclaimed_bytes -= self._unclaimed.pop(hash_part, ("", 0))[1]

    def _is_active(self) -> bool:
        return asyncio.get_running_loop().time() - self._last_request < _IDLE_S and self._last_request > 0

    def _fill(self) -> None:
        """Start as many fetches as the connections and the budget allow."""
        while self._fetching < _CONNECTIONS and (path := self._next()):
            self._fetching += 1
            self._tasks.spawn(self._fetch(path))
        if self._unclaimed and (self._cleaner is None or self._cleaner.done()):
            self._cleaner = self._tasks.spawn(self._clean())

    def _next(self) -> RemotePath | None:
        """Take the next path that is still wanted and known, if it fits into the budget."""
        while self._queue:
            hash_part = self._queue[0][1]
            path = self._plans.find(hash_part) if hash_part in self._wanted else None
            size = 0 if path is None else path.nar.file_size or path.info.nar_size
            if path is not None and size <= self._budget < self._unclaimed_bytes + size:
                return None  # until a client has requested some of them
            heapq.heappop(self._queue)
            self._wanted.discard(hash_part)
            if path is not None and size <= self._budget:
                self._claim(path, size)
                return path
        return None

    async def _fetch(self, path: RemotePath) -> None:
        hash_part = path.info.path.hash_part
        size = 0
        try:
            size = await self._fetcher.fetch_ahead(path, self._headers())
        finally:
            self._fetching -= 1
            if hash_part in self._unclaimed:  # by its real size: FileSize is not signed
                self._release(hash_part)
                if size:
                    self._claim(path, size)
        if self._is_active():
            self._fill()

    async def _clean(self) -> None:
        """Remove the NARs that no client has asked for, when no client comes any more."""
        loop = asyncio.get_running_loop()
        while (rest := self._last_request + _UNCLAIMED_S - loop.time()) > 0:  # noqa: ASYNC110 (it changes meanwhile)
            await asyncio.sleep(rest)
        unclaimed, self._unclaimed, self._unclaimed_bytes = self._unclaimed, {}, 0
        self._wanted.clear()
        self._queue.clear()
        await self._fetcher.drop([key for key, _ in unclaimed.values()])
