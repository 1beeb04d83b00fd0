"""The mirror's bucket as a target of uploads.

Objects are written unless they exist, and their bytes follow from the path and from the signing keys. So several
writers need no locks, and a writer that was killed leaves nothing to repair.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from harmonia.cache.layout_cache import Layouts
from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.mirror import layout
from harmonia.mirror.collector import CollectionState
from harmonia.nix import cache_info, listing, narinfo
from harmonia.nix.build_id import build_ids, member
from harmonia.nix.build_trace import render_build_trace, render_realisation
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import build_log
from harmonia.store.store import Store
from harmonia.store.store_nar import StoreNar
from harmonia.upload.target import Body, TargetChangedError, TargetRefusedError

if TYPE_CHECKING:
    from harmonia.mirror.bucket import Bucket

_MAX_REQUESTS = 32  # at once
_SINGLE_MAX_BYTES = 16 << 20
"""Size up to which a NAR is written by one conditional request. In parts, obstore cannot write conditionally."""
_SMALL_LISTING_ENTRIES = 20_000
_PIECE_BYTES = 1 << 20
_COLLECTION_POLL_S = 2.0  # between two questions whether a garbage collection has ended

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class BucketTarget:
    """Implementation of `upload.target.Target`."""

    def __init__(self, settings: Settings, bucket: "Bucket") -> None:
        """Write listings, logs and realisations of the store of the settings, besides what an upload has."""
        self.name = bucket.url
        self._settings = settings
        self._bucket = bucket
        self._store = Store.of(settings)
        self._database = ThreadPoolExecutor(1, thread_name_prefix="mirror-database")
        self._keys = credentials.secret_keys(settings)
        self._layouts = Layouts()
        self._requests = asyncio.Semaphore(_MAX_REQUESTS)
        self._collection: CollectionState | None = None
        """The state of the bucket's garbage collection before the first question which paths are missing."""

    async def close(self) -> None:
        self._database.shutdown()
        self._store.database.close()

    async def check(self) -> None:
        """Write `nix-cache-info`, if the bucket has none. Raises TargetRefusedError if it is for another store."""
        settings = self._settings
        text = layout.cache_info(settings.virtual_nix_store, settings.priority)
        if not await self._bucket.create(layout.CACHE_INFO, text, layout.CACHE_INFO_TYPE):
            found = cache_info.parse(await self._bucket.get(layout.CACHE_INFO) or b"").get("StoreDir")
            if found != settings.virtual_nix_store:
                what = f"the bucket is a cache of {found}, not of {settings.virtual_nix_store}"
                raise TargetRefusedError(f"{self.name}: {what}; set another mirror.bucket or mirror.prefix")

    async def keep(self, paths: Collection[StorePath]) -> set[StorePath]:
        """Keep closures for the time of `harmonia mirror gc --keep`, from now on. Return those paths that are there.

        A collection that begins later sees the roots. So this waits for one that runs, and then asks again.
        """
        if not paths:
            return set()
        await self._all(self._bucket.replace(layout.root_key(path), b"", "text/plain") for path in paths)
        if await self._collected():
            return {*paths} - await self.missing(paths)
        return {*paths}

    async def missing(self, paths: Collection[StorePath]) -> set[StorePath]:
        if self._collection is None:
            self._collection = await CollectionState.read(self._bucket)
        sizes = await self._all(self._bucket.size(layout.narinfo_key(path)) for path in paths)
        return {path for path, size in zip(paths, sizes, strict=True) if size is None}

    async def put_nar(self, url: str, body: Body) -> bool:
        if body.size <= _SINGLE_MAX_BYTES:
            content = b"".join([chunk async for chunk in body.chunks()])
            return await self._bucket.create(url, content, layout.NAR_TYPE)
        if await self._bucket.size(url) == body.size:
            return False
        await self._bucket.replace(url, body.chunks(), layout.NAR_TYPE, body.size)
        return True

    async def put_narinfo(self, path: StorePath, text: str) -> None:
        """Write the narinfo, after the other objects of a path: a killed writer leaves no path without them."""
        info, nar = narinfo.parse(text, self._store.store_dir)
        await self._put_listing(info)
        root = self._store.real_path(path)
        links = {
            layout.debuginfo_key(each): json.dumps({"archive": f"../{nar.url}", "member": member(each)}).encode()
            for each in await asyncio.to_thread(lambda: list(build_ids(root)))
        }
        await self._all(self._bucket.create(key, link, layout.JSON_TYPE) for key, link in links.items())
        if info.deriver is not None:
            await self._put_log(info.deriver)
        loop = asyncio.get_running_loop()
        for key, realisation in await loop.run_in_executor(self._database, lambda: [*self._realisations(path)]):
            await self._bucket.create(key, realisation, layout.JSON_TYPE)
        await self._bucket.create(layout.narinfo_key(path), text.encode(), narinfo.CONTENT_TYPE)
        await self._check_collection(info, nar)

    async def _check_collection(self, info: PathInfo, nar: NarFile) -> None:
        """Delete the narinfo if a garbage collection has deleted a part of its closure since `missing`.

        Raises TargetChangedError in that case: the upload has to be repeated.
        """
        if not await self._collected():
            return
        keys = [layout.narinfo_key(each) for each in info.references] + [nar.url]
        if None in await self._all(self._bucket.size(key) for key in keys):
            await self._bucket.delete([layout.narinfo_key(info.path)])
            what = f"a garbage collection deleted a part of the closure of {info.path} meanwhile"
            raise TargetChangedError(f"{self.name}: {what}")

    async def _collected(self) -> bool:
        """Return True if a garbage collection may have deleted paths since the first question. Waits for its end.

        The first question of this target counts, not the last one: several uploads may run, each with answers of its
        own. After a collection, each path therefore takes some more requests, until this process ends.
        """
        state = await CollectionState.read(self._bucket)
        if self._collection is None or not self._collection.changed(state):
            return False
        if state.is_alive:
            _log.warning("%s: a garbage collection runs on %s; waiting for its end", self.name, state.host)
        while state.is_alive:
            await asyncio.sleep(_COLLECTION_POLL_S)
            state = await CollectionState.read(self._bucket)
        return True

    async def _put_listing(self, info: PathInfo) -> None:
        nar = StoreNar(info, self._store.real_path(info.path), self._layouts)
        with closing(nar.layout()) as found:
            if (waiting := found.wait_whole()) is not None:
                await asyncio.wrap_future(waiting)
            nar.check_layout(found)
            pieces = listing.render(found.located())
            if found.entries <= _SMALL_LISTING_ENTRIES:
                text = await asyncio.to_thread(b"".join, pieces)
                await self._bucket.create(layout.listing_key(info.path), text, layout.JSON_TYPE)
            else:
                await self._bucket.replace(layout.listing_key(info.path), _batched(pieces), layout.JSON_TYPE)

    async def _put_log(self, derivation: StorePath) -> None:
        key = layout.log_key(derivation)
        log = await asyncio.to_thread(build_log.find_log, self._settings.logs, derivation)
        if log is not None and log.finished and await self._bucket.size(key) is None:
            await self._bucket.replace(key, _batched(log.read(0, None)), layout.LOG_TYPE)

    def _realisations(self, path: StorePath) -> Iterator[tuple[str, bytes]]:
        """Yield the key and the text of each realisation of a path, for old and for new versions of Nix."""
        store, keys = self._store, self._keys
        for derivation, output in store.realisation_ids(path):
            if (found := store.realisation(derivation, output)) is not None:
                text = render_realisation(f"{derivation}!{output}", found, keys)
                yield layout.realisation_key(derivation, output), text
        for derivation, output in store.build_trace_keys(path):
            if (found := store.build_trace(derivation, output)) is not None:
                text = render_build_trace(derivation, output, found, keys)
                yield layout.build_trace_key(derivation, output), text

    async def _all(self, requests: Iterable[Awaitable[_T]]) -> list[_T]:
        """Return the results of requests, of which _MAX_REQUESTS run at once."""

        async def limited(request: Awaitable[_T]) -> _T:
            async with self._requests:
                return await request

        return await asyncio.gather(*map(limited, requests))


def _batched(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of small pieces in larger ones."""
    batch = bytearray()
    for piece in pieces:
        batch += piece
        if len(batch) >= _PIECE_BYTES:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)
