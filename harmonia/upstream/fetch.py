"""NARs of upstreams: written to the cache as they come, once however many want them, and read from there.

A NAR becomes whole, for those who read it already, when its file has proved to be what its narinfo said, and it is kept
for others when its content has, too. Until then its last bytes are held back (cache/growing_file.py), so that nobody
ever gets a complete body that is not what the upstream meant to send. Where the cache cannot take one, it is passed on.
"""

import asyncio
from collections.abc import Mapping
from functools import partial

import aiohttp

from harmonia.cache.disk_cache import NarCache
from harmonia.upstream import nar_verifier
from harmonia.upstream.cached_body import Kept
from harmonia.upstream.passthrough_body import Passed
from harmonia.upstream.remote_path import Found
from harmonia.upstream.tasks import Tasks, Threads
from harmonia.upstream.transfer import Transfer
from harmonia.upstream.transport import WHOLE, Part

_MOST = 100  # NARs that are fetched at once, whoever waits for them; each has a connection and an open file


class Fetches:
    """All NARs that are on their way here."""

    def __init__(self, cache: NarCache | None) -> None:
        self._cache = cache
        self._running: dict[str, Transfer] = {}
        self._tasks = Tasks()
        self._opening = asyncio.Lock()
        self._threads = Threads()

    async def close(self) -> None:
        for transfer in self._running.values():
            transfer.give_up()
        await self._tasks.stop()

    async def find(self, key: str) -> Kept | None:
        """The NAR of that key, whole, if it is in the cache."""
        file = None if self._cache is None else await self._threads.write(self._cache.use, key)
        return None if file is None else Kept(file)

    async def open(self, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        """Its NAR: from the cache, or as it comes. UpstreamError where it does not."""
        # A client that goes away must not leave behind a file that nobody fills.
        return await asyncio.shield(self._tasks.share(self._open(found, headers)))

    async def _open(self, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        cache = self._cache
        key = found.name.key
        opened = None
        if cache is not None and nar_verifier.conclusive(found.nar) and (found.file_size or 0) <= cache.limit:
            async with self._opening:
                if key in self._running or len(self._running) < _MOST:
                    opened = await self._threads.write(cache.open, key)
                elif file := await self._threads.write(cache.use, key):
                    opened = file, None
                if opened is not None and opened[1] is not None:
                    transfer = self._running[key] = Transfer(found, headers, opened[1], cache.limit, self._threads)
                    self._tasks.begin(self._run(key, transfer))
        if opened is None:
            return _passed(found, headers, await found.ask(headers, WHOLE, checked=nar_verifier.has_hash(found.nar)))
        running = self._running.get(key)
        if running is None:  # another worker fetches it
            return Kept(opened[0], found.file_size, None, _passed(found, headers))
        await running.started.wait()
        if running.error is not None:
            opened[0].close()  # the error, which the fetch has, would keep it
            raise running.error
        return Kept(opened[0], running.size, running, _passed(found, headers))

    async def _run(self, key: str, transfer: Transfer) -> None:
        try:
            await transfer.run()
        finally:
            if self._running.get(key) is transfer:  # and not the next one, which a failure may have called for
                del self._running[key]


def _passed(found: Found, headers: Mapping[str, str], response: aiohttp.ClientResponse | None = None) -> Passed:
    """The NAR without the cache. Where it is passed on from its beginning to its end, it is checked if it can be."""
    check = partial(nar_verifier.check_file, found.info, found.nar) if nar_verifier.has_hash(found.nar) else None

    async def ask(part: Part) -> aiohttp.ClientResponse:
        return await found.ask(headers, part, checked=check is not None and part == WHOLE)

    return Passed(found.client, ask, response, check, found.file_size)
