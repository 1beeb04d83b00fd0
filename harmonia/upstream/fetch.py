"""Fetching of upstream NARs: written to the cache while they arrive, once for all clients, and read from there.

The current readers get the end of a NAR when the file has the FileHash of its narinfo, or when the unpacked NAR is
verified. Later clients get it only after it is verified. Until then, the last bytes are held back
(cache/growing_file.py): no client gets a complete body that the upstream did not mean to send. If the cache cannot
store a NAR, it is passed through.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from harmonia.cache.disk_cache import DiskCache
from harmonia.nix.narinfo import NarFile
from harmonia.ownership import closed_on_error, hand_over
from harmonia.process.thread_reader import Submit
from harmonia.process.threads import Threads
from harmonia.upstream.answer import Answer
from harmonia.upstream.bodies import CachedBody, PassthroughBody, StoredBody
from harmonia.upstream.failed_nars import FailedNars
from harmonia.upstream.nar_verifier import StreamCheck
from harmonia.upstream.narinfo_cache import NarinfoCache
from harmonia.upstream.refusals import UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.small_nars import SmallNar, SmallNars
from harmonia.upstream.tasks import Tasks
from harmonia.upstream.transfer import Transfer
from harmonia.upstream.transport import WHOLE

_MAX_FETCHES_AHEAD = 50  # transfers from which on no NAR is fetched ahead
_MAX_FETCHES = 100  # NARs that are fetched at once; each has a connection and an open file


class NarFetcher:
    """All running transfers of NARs into the cache."""

    def __init__(
        self, cache: DiskCache | None, narinfos: NarinfoCache | None, failed: FailedNars, threads: Threads
    ) -> None:
        self._cache = cache
        self._narinfos = narinfos
        self._failed = failed
        self._running: dict[str, Transfer] = {}
        self._tasks = Tasks()
        self._opening = asyncio.Lock()
        self._threads = threads
        self._small = None if cache is None else SmallNars(cache, narinfos, threads)

    async def close(self) -> None:
        for transfer in self._running.values():
            transfer.give_up()
        await self._tasks.stop()
        for transfer in self._running.values():  # transfers whose task has not begun
            transfer.abandon()

    async def cached_nar(self, key: str, submit: Submit) -> CachedBody | None:
        """Return the complete NAR with this key from the cache, or None. `submit` runs its reader in a thread."""
        if self._cache is None:
            return None
        file = await hand_over(asyncio.ensure_future(self._threads.write(self._cache.use_file, key)))
        return None if file is None else CachedBody(file, submit)

    async def take_small(self, key: str) -> SmallNar | None:
        """Return a complete NAR that was fetched ahead and is in memory, once, or None."""
        return None if self._small is None else await self._small.take(key)

    def take_small_now(self, key: str) -> SmallNar | None:
        """Like `take_small`, but return None for a NAR that is being fetched. Does not block."""
        return None if self._small is None else self._small.take_now(key)

    def file_info_now(self, path: RemotePath) -> NarFile | None:
        """Return the result of `file_info`, or None if a thread has to look into the cache. Does not block."""
        if self._cache is None:
            return path.nar
        if not self._threads.loop_io.allowed:
            return None
        return self._threads.loop_io.run(partial(_cached_file_info, self._cache, path))

    async def file_info(self, path: RemotePath) -> NarFile:
        """Return URL, hash and size of a NAR file: from the cache if the file is there, otherwise from the narinfo."""
        if self._cache is None:
            return path.nar
        return await self._threads.run_short_io(partial(_cached_file_info, self._cache, path))

    async def open_nar(
        self, path: RemotePath, headers: Mapping[str, str], submit: Submit
    ) -> CachedBody | PassthroughBody:
        """Open a NAR: from the cache, or from the upstream. `submit` runs its reader in a thread.

        Raises UpstreamError if the upstream fails.
        """
        # If the client disconnects, the fetch continues: otherwise, an incomplete file would stay locked.
        return await hand_over(self._tasks.spawn_shared(self._open_nar(path, headers, submit)))

    async def _open_nar(
        self, path: RemotePath, headers: Mapping[str, str], submit: Submit
    ) -> CachedBody | PassthroughBody:
        cache = self._cache
        key = path.name.key
        opened = None
        # FileSize is only a hint. If a file turns out to be too large, the rest is passed through.
        if cache is not None and (path.nar.file_size or 0) <= cache.limit:
            async with self._opening:
                if key in self._running or len(self._running) < _MAX_FETCHES:
                    opened = await self._threads.write(cache.open_file, key)
                elif file := await self._threads.write(cache.use_file, key):
                    opened = file, None
                if opened is not None and opened[1] is not None:
                    transfer = self._running[key] = Transfer(path, headers, opened[1], cache.limit, self._threads)
                    self._tasks.spawn(self._run(key, transfer))
        if opened is None:
            return self._passthrough_body(path, headers, await path.request_nar(headers, WHOLE))
        running = self._running.get(key)
        with closed_on_error(opened[0]) as reader:
            if running is None:  # complete, or fetched by another worker, and only that one knows the length
                if not reader.whole:
                    await self._threads.write(reader.refresh)  # perhaps it has become complete just now
                self._keep_narinfos([path])
                return CachedBody(reader, submit, path.file_size, None, self._passthrough_body(path, headers))
            running.paths[path.info.path] = path
            await running.started.wait()
            if running.error is not None:
                raise running.error
            return CachedBody(reader, submit, running.size, running, self._passthrough_body(path, headers))

    async def fetch_ahead(self, path: RemotePath, headers: Mapping[str, str]) -> int:
        """Fetch a NAR into the cache, and wait for the end. Return the length of its file in bytes.

        Returns 0 if it was there, or could not be fetched.
        """
        if self._small is None or path.name.key in self._running:
            return 0
        try:
            fetched = await self._small.fetch(path, headers)
        except UpstreamMismatchError:  # logged
            self._note_result(path, failed=True)
            return 0
        return await self._transfer_ahead(path, headers) if fetched is None else fetched

    async def _transfer_ahead(self, path: RemotePath, headers: Mapping[str, str]) -> int:
        cache, key = self._cache, path.name.key
        if cache is None or (path.nar.file_size or 0) > cache.limit:
            return 0
        async with self._opening:
            if key in self._running or len(self._running) >= _MAX_FETCHES_AHEAD:
                return 0
            opened = await self._threads.write(cache.open_file, key)
            if opened is None:
                return 0
            opened[0].close()
            if opened[1] is None:
                return 0
            transfer = self._running[key] = Transfer(path, headers, opened[1], cache.limit, self._threads)
            running = self._tasks.spawn(self._run(key, transfer))
        await asyncio.wait({running})
        if transfer.error is not None:
            return 0
        await self._threads.write(cache.mark_unused, key)
        return transfer.received

    async def drop(self, keys: Sequence[str]) -> None:
        """Remove NARs that were fetched ahead from the cache, except those that a client of any worker has used."""
        if (cache := self._cache) is not None:
            for key in keys:
                if self._small is not None:
                    self._small.forget(key)
                await self._threads.write(cache.remove_unused, key)

    def stored_body(self, file: CachedBody | PassthroughBody, path: RemotePath, submit: Submit) -> StoredBody:
        """Convert the zstd file of a NAR to one without compression, whose length is known. Take over `file`."""
        return StoredBody(file, path.info.nar_size, submit, self._threads)

    async def _run(self, key: str, transfer: Transfer) -> None:
        try:
            await transfer.run()
        finally:
            if self._running.get(key) is transfer:  # not a new transfer that began after a failure
                del self._running[key]
        self._note_result(transfer.path, failed=transfer.error is not None)
        self._keep_narinfos(transfer.paths.values())

    def _keep_narinfos(self, paths: Iterable[RemotePath]) -> None:
        """Keep the narinfos of paths whose NAR is in the cache, or may soon be."""
        if self._narinfos is not None:
            for path in paths:
                self._tasks.spawn(self._narinfos.keep(path))

    def _note_result(self, path: RemotePath, *, failed: bool) -> None:
        """Remember whether the NAR in a narinfo can be downloaded."""
        (self._failed.add if failed else self._failed.remove)(path.client.id, path.name.key)

    def _passthrough_body(
        self, path: RemotePath, headers: Mapping[str, str], response: Answer | None = None
    ) -> PassthroughBody:
        """Return the NAR as a passthrough body. It is verified if it is read from its beginning to its end."""
        return PassthroughBody(
            path.client,
            partial(path.request_nar, headers, checked=False),
            response,
            partial(StreamCheck, path, self._threads, partial(self._note_result, path)),
            path.file_size,
            partial(path.request_nar, headers, WHOLE),
        )


def _cached_file_info(cache: DiskCache, path: RemotePath) -> NarFile:
    file = cache.find_file(path.name.key)
    if file is None:
        return path.nar
    with closing(file):
        return replace(path.nar, file_hash=file.sha256, file_size=file.size)


async def request_size(path: RemotePath, headers: Mapping[str, str]) -> int | None:
    """Return the size of a NAR file in bytes, from a HEAD request, or None if the upstream does not send it.

    Raises UpstreamError if the request fails.
    """
    async with await path.request_nar(headers, WHOLE, "HEAD") as answer:
        return answer.content_length
