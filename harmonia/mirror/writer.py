"""Writer of closures to the mirror's bucket.

A narinfo is written after its NAR and after the narinfos of its references. So each narinfo in the bucket has its whole
closure there, also if the writer is killed at any time. Each object has the same bytes from every writer with the same
keys and the same `[zstd]`, and is written unless it exists: writers need no locks, and a repeated run continues.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from harmonia.cache.growing_file import CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.config.settings import Settings
from harmonia.errors import CacheFileError, MirrorError, StoreObjectError
from harmonia.mirror import layout
from harmonia.nix import listing, narinfo
from harmonia.nix.build_id import build_ids, member
from harmonia.nix.build_trace import render_build_trace, render_realisation
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store import build_log
from harmonia.store.store import Store
from harmonia.store.store_nar import StoreNar

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket

_MAX_LOOKUPS = 32  # requests at once whether a narinfo exists
_MAX_UPLOADS = 4  # NARs at once, each with at most 16 MiB in memory
_MAX_TRIES = 2  # of a NAR whose file in our own cache is damaged or disappears
_POLL_S = 0.01  # between two checks whether a NAR is compressed
_SMALL_BYTES = 16 << 20  # of an object that is written by one conditional request
_SMALL_LISTING_ENTRIES = 20_000
_PIECE_BYTES = 1 << 20

State = Literal["written", "there", "failed"]


class Result(NamedTuple):
    path: StorePath
    state: State
    what: str = ""
    """The reason of a failure."""


class MirrorWriter:
    """Writer of store paths to a bucket. Use it on one event loop."""

    def __init__(
        self, settings: Settings, bucket: "Bucket", store: Store, keys: Sequence[SecretKey], compressor: Compressor
    ) -> None:
        """Write to `bucket`. `compressor` must have a cache, in which NARs are verified before they are written."""
        self._settings = settings
        self._bucket = bucket
        self._store = store
        self._keys = keys
        self._compressor = compressor
        self._layouts = Layouts()
        self._lookups = asyncio.Semaphore(_MAX_LOOKUPS)
        self._uploads = asyncio.Semaphore(_MAX_UPLOADS)

    async def prepare(self) -> None:
        """Write `nix-cache-info`, if the bucket has none. Raises MirrorError if the bucket is for another store."""
        settings = self._settings
        text = layout.cache_info(settings.virtual_nix_store, settings.priority)
        if not await self._bucket.create(layout.CACHE_INFO, text, layout.CACHE_INFO_TYPE):
            found = layout.store_dir(await self._bucket.get(layout.CACHE_INFO) or b"")
            if found != settings.virtual_nix_store:
                what = f"the bucket is a cache of {found}, not of {settings.virtual_nix_store}"
                raise MirrorError(f"{self._bucket.url}: {what}; set another mirror.bucket or mirror.prefix")

    async def write(self, infos: Sequence[PathInfo]) -> AsyncIterator[Result]:
        """Yield a result for each path, in the order of completion. `infos` must contain all references.

        A path fails if its store object is damaged, or if one of its references fails. Raises MirrorError if the bucket
        cannot be written; the same call later continues.
        """
        await self.prepare()
        tasks: dict[StorePath, asyncio.Task[Result]] = {}
        for info in infos:
            tasks[info.path] = asyncio.create_task(self._write(info, tasks))
        try:
            for done in asyncio.as_completed(tasks.values()):
                yield await done
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _write(self, info: PathInfo, tasks: dict[StorePath, "asyncio.Task[Result]"]) -> Result:
        async with self._lookups:
            is_there = await self._bucket.size(layout.narinfo_key(info.path)) is not None
        if is_there:
            await self._write_realisations(info.path)  # a killed writer may not have come so far
            return Result(info.path, "there")
        try:
            async with self._uploads:
                nar = await self._write_nar(info)
                await self._write_beside(info, nar)
        except (StoreObjectError, CacheFileError, OSError) as error:
            return Result(info.path, "failed", str(error))
        for reference in info.references:
            if reference != info.path and (await tasks[reference]).state == "failed":
                return Result(info.path, "failed", f"its reference {reference} failed")
        sigs = narinfo.signatures(info, self._store.store_dir, self._keys)
        text = narinfo.render(info, self._store.store_dir, nar, sigs).encode()
        await self._bucket.create(layout.narinfo_key(info.path), text, narinfo.CONTENT_TYPE)
        await self._write_realisations(info.path)
        return Result(info.path, "written")

    async def _write_nar(self, info: PathInfo) -> NarFile:
        """Compress and verify a NAR in our cache, then write it. Return its file."""
        key = layout.nar_key(info, self._compressor.encoder.encoding)
        for number in range(_MAX_TRIES):
            try:
                with closing(await self._compressed(info)) as file:
                    if await self._bucket.size(key) != file.size:
                        await self._write_file(key, file)
                    return NarFile(key, "zstd", file.sha256, file.size)
            except CacheFileError:  # the damaged file was removed, so the next try makes it again
                if number == _MAX_TRIES - 1:
                    raise
        raise AssertionError

    async def _write_file(self, key: str, file: CachedFile) -> None:
        if file.size <= _SMALL_BYTES:
            await self._bucket.create(key, await asyncio.to_thread(file.content), layout.NAR_TYPE)
        else:
            pieces = iter(partial(file.slice(0, file.size).read, _PIECE_BYTES), b"")
            await self._bucket.replace(key, pieces, layout.NAR_TYPE, file.size)

    async def _compressed(self, info: PathInfo) -> CachedFile:
        """Return the complete compressed NAR, whose content has its registered hash. The caller closes it.

        Raises StoreObjectError if the store object is damaged, and OSError if it cannot be read.
        """
        encoding = self._compressor.encoder.encoding
        nar = self._nar(info)
        for _ in range(_MAX_TRIES):
            file = await asyncio.to_thread(self._compressor.open_file, nar, encoding)
            if file is None:
                break
            try:
                while not file.whole:
                    file.refresh()
                    if not file.whole and file.lock():  # no process fills this file any more
                        file.refresh()
                        break
                    await asyncio.sleep(_POLL_S)
                if file.whole:
                    return file
            except BaseException:
                file.close()
                raise
            file.close()
        raise StoreObjectError(f"{nar}: cannot be compressed, or is damaged; see the log above")

    def _nar(self, info: PathInfo) -> StoreNar:
        return StoreNar(info, self._store.real_path(info.path), self._layouts)

    async def _write_beside(self, info: PathInfo, nar: NarFile) -> None:
        """Write the objects that belong to a path besides its NAR and its narinfo."""
        with closing(self._nar(info).layout()) as found:
            if (waiting := found.wait_whole()) is not None:
                await asyncio.wrap_future(waiting)
            self._nar(info).check_layout(found)
            pieces = listing.render(found.located())
            if found.entries <= _SMALL_LISTING_ENTRIES:
                text = await asyncio.to_thread(b"".join, pieces)
                await self._bucket.create(layout.listing_key(info.path), text, layout.JSON_TYPE)
            else:
                await self._bucket.replace(layout.listing_key(info.path), _batched(pieces), layout.JSON_TYPE)
        for build_id in await asyncio.to_thread(lambda: list(build_ids(self._store.real_path(info.path)))):
            link = json.dumps({"archive": f"../{nar.url}", "member": member(build_id)}).encode()
            await self._bucket.create(layout.debuginfo_key(build_id), link, layout.JSON_TYPE)
        if info.deriver is not None:
            await self._write_log(info.deriver)

    async def _write_log(self, derivation: StorePath) -> None:
        key = layout.log_key(derivation)
        log = await asyncio.to_thread(build_log.find_log, self._settings.logs, derivation)
        if log is not None and log.finished and await self._bucket.size(key) is None:
            await self._bucket.replace(key, _batched(log.read(0, None)), layout.LOG_TYPE)

    async def _write_realisations(self, path: StorePath) -> None:
        for derivation, output in self._store.realisation_ids(path):
            if (found := self._store.realisation(derivation, output)) is not None:
                text = render_realisation(f"{derivation}!{output}", found, self._keys)
                await self._write_json(layout.realisation_key(derivation, output), text)
        for derivation, output in self._store.build_trace_keys(path):
            if (found := self._store.build_trace(derivation, output)) is not None:
                text = render_build_trace(derivation, output, found, self._keys)
                await self._write_json(layout.build_trace_key(derivation, output), text)

    async def _write_json(self, key: str, text: bytes) -> None:
        if await self._bucket.size(key) is None:
            await self._bucket.create(key, text, layout.JSON_TYPE)


def _batched(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of small pieces in larger ones."""
    batch = bytearray()
    for piece in pieces:
        batch += piece
        if len(batch) >= _PIECE_BYTES:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)
