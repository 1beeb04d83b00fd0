"""NARs of upstreams: written to the cache as they come, once however many want them, and read from there.

A NAR becomes whole, for those who read it already, when its file has the hash that its narinfo tells, or else when its
content has proved right; it is kept for others when its content has. Until then its last bytes are held back
(cache/growing_file.py), so that nobody ever gets a complete body that is not what the upstream meant to send. If the
cache cannot take one, it is passed on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from harmonia.cache.disk_cache import NarCache
from harmonia.errors import FormatError
from harmonia.nix.decompress import LARGE_MEMORY_BYTES, WindowError
from harmonia.nix.narinfo import NarFile
from harmonia.ownership import closed_on_error, hand_over
from harmonia.process.thread_reader import Submit
from harmonia.upstream.answer import Answer
from harmonia.upstream.cached_body import CachedBody
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.nar_verifier import ContentCheck
from harmonia.upstream.narinfo_cache import NarinfoCache
from harmonia.upstream.passthrough_body import PassthroughBody
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.tasks import FetchThreads, Tasks
from harmonia.upstream.transfer import Transfer
from harmonia.upstream.transport import WHOLE

_MAX_FETCHES = 100  # NARs that are fetched at once, whoever waits for them; each has a connection and an open file
_BEGIN_MAX_BYTES = 1 << 20
"""The beginning of a file that is passed on, kept to unpack it anew: it tells how large the window is."""

_T = TypeVar("_T")


class NarFetcher:
    """All NARs that are on their way here."""

    def __init__(
        self, cache: NarCache | None, narinfos: NarinfoCache | None, failed: FailedNars, threads: FetchThreads
    ) -> None:
        self._cache = cache
        self._narinfos = narinfos
        self._failed = failed
        self._running: dict[str, Transfer] = {}
        self._tasks = Tasks()
        self._opening = asyncio.Lock()
        self._threads = threads

    async def close(self) -> None:
        for transfer in self._running.values():
            transfer.give_up()
        await self._tasks.stop()
        for transfer in self._running.values():  # those that had not begun
            transfer.abandon()

    async def cached_nar(self, key: str, submit: Submit) -> CachedBody | None:
        """The NAR of that key, whole, if it is in the cache. `submit` is for its reader."""
        if self._cache is None:
            return None
        file = await hand_over(asyncio.ensure_future(self._threads.write(self._cache.use_file, key)))
        return None if file is None else CachedBody(file, submit)

    async def file_info(self, found: RemotePath) -> NarFile:
        """Return what is known of the file of a NAR: that of the cache, or else what its narinfo tells."""
        file = None if self._cache is None else await self._threads.write(self._cache.find_file, found.name.key)
        if file is None:
            return found.nar
        try:
            return replace(found.nar, file_hash=file.sha256, file_size=file.size)
        finally:
            file.close()

    async def open_nar(
        self, found: RemotePath, headers: Mapping[str, str], submit: Submit
    ) -> CachedBody | PassthroughBody:
        """Its NAR: from the cache, or as it comes. UpstreamError where it does not. `submit` is for its reader."""
        # A client that goes away must not leave behind a file that nobody fills.
        return await hand_over(self._tasks.spawn_shared(self._open(found, headers, submit)))

    async def _open(
        self, found: RemotePath, headers: Mapping[str, str], submit: Submit
    ) -> CachedBody | PassthroughBody:
        cache = self._cache
        key = found.name.key
        opened = None
        # A FileSize is only a hint; what proves to be too large after all is passed on from there.
        if cache is not None and (found.nar.file_size or 0) <= cache.limit:
            async with self._opening:
                if key in self._running or len(self._running) < _MAX_FETCHES:
                    opened = await self._threads.write(cache.open_file, key)
                elif file := await self._threads.write(cache.use_file, key):
                    opened = file, None
                if opened is not None and opened[1] is not None:
                    transfer = self._running[key] = Transfer(found, headers, opened[1], cache.limit, self._threads)
                    self._tasks.spawn(self._run(key, transfer))
        if opened is None:
            return self._passed(found, headers, await found.request_nar(headers, WHOLE))
        running = self._running.get(key)
        if running is None:  # it is whole, or another worker fetches it, which alone knows the length of what comes
            self._keep_narinfos([found])
            return CachedBody(opened[0], submit, found.file_size, None, self._passed(found, headers))
        with closed_on_error(opened[0]) as reader:
            running.paths[found.info.path] = found
            await running.started.wait()
            if running.error is not None:
                raise running.error
            return CachedBody(reader, submit, running.size, running, self._passed(found, headers))

    async def _run(self, key: str, transfer: Transfer) -> None:
        try:
            await transfer.run()
        finally:
            if self._running.get(key) is transfer:  # and not the next one, which a failure may have called for
                del self._running[key]
        self._note(transfer.found, failed=transfer.error is not None)
        self._keep_narinfos(transfer.paths.values())

    def _keep_narinfos(self, paths: Iterable[RemotePath]) -> None:
        """Keep the narinfos of paths whose NAR is in the cache, or may soon be."""
        if self._narinfos is not None:
            for found in paths:
                self._tasks.spawn_shared(self._narinfos.keep(found))

    def _note(self, found: RemotePath, *, failed: bool) -> None:
        """Remember whether the upstream has the NAR that it tells of."""
        (self._failed.add if failed else self._failed.remove)(found.client.id, found.name.key)

    def _passed(self, found: RemotePath, headers: Mapping[str, str], response: Answer | None = None) -> PassthroughBody:
        """Return the NAR without the cache. It is checked if it is passed on from its beginning to its end."""
        return PassthroughBody(
            found.client,
            partial(found.request_nar, headers, checked=False),
            response,
            partial(self._check, found),
            found.file_size,
            partial(found.request_nar, headers, WHOLE),
        )

    def _check(self, found: RemotePath) -> "_ThreadedCheck":
        return _ThreadedCheck(found, self._threads, partial(self._note, found))


class _ThreadedCheck:
    """A ContentCheck that unpacks in the threads for that.

    A file with a large window is begun again with more memory, unless another file has that: its client may be slow.
    """

    def __init__(self, found: RemotePath, threads: FetchThreads, note: Callable[..., None]) -> None:
        self._found = found
        self._check = ContentCheck(found.info, found.nar)
        self._begun = b""
        self._size = 0
        self._threads = threads
        self._has_much_memory = False
        self._note = note

    async def update(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= _BEGIN_MAX_BYTES:
            self._begun += data
        await self._noted(self._update, data)

    async def finish(self) -> None:
        await self._noted(self._threads.unpack, self._check.finish)
        self._note(failed=False)

    def close(self) -> None:
        if self._has_much_memory:
            self._has_much_memory = False
            self._threads.much_memory.release()

    async def _update(self, data: bytes) -> None:
        try:
            await self._threads.unpack(self._check.update, data)
        except WindowError:
            if len(self._begun) < self._size or self._threads.much_memory.locked():
                raise
            await self._threads.much_memory.acquire()
            self._has_much_memory = True
            self._check = ContentCheck(self._found.info, self._found.nar, LARGE_MEMORY_BYTES)
            await self._threads.unpack(self._check.update, self._begun)

    async def _noted(self, function: Callable[[_T], Awaitable[None]], argument: _T) -> None:
        try:
            await function(argument)
        except FormatError as error:
            self._note(failed=True)
            raise self._found.refuse_nar(error) from None


async def unread_size(found: RemotePath, headers: Mapping[str, str]) -> int | None:
    """Ask the upstream how many bytes a NAR has as it comes. Raise UpstreamError."""
    async with await found.request_nar(headers, WHOLE, "HEAD") as answer:
        return answer.content_length
