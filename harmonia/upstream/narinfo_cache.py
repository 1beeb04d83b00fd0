"""Cache of narinfos on disk, for paths whose NARs are in the NAR cache: these are served even if upstreams are down.

The file name is the hash part of the path. The first line has the id of the upstream and the key of the NAR; the
narinfo follows. A cached narinfo is trusted no more than the upstream: each time it is read, it is checked like a
narinfo that has just arrived, with the current settings.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace

from harmonia.cache.disk_cache import DiskCache, open_cache
from harmonia.cache.growing_file import CachedFile
from harmonia.config.settings import Settings
from harmonia.errors import CacheFileError
from harmonia.nix import narinfo
from harmonia.process.threads import Threads
from harmonia.upstream.client import Client
from harmonia.upstream.refusals import UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath, parse

_MAX_BYTES = 256 << 20  # on disk: 64,000 narinfos
_NAR_CACHE_SHARE = 8  # at most one eighth of the NAR cache's limit, if that is less
_RECORD_MAX_BYTES = 4 << 20
_CHECK_INTERVAL_S = 0.5  # between two checks whether another worker has fetched a NAR
_MAX_WAIT_S = 3600.0  # for another worker to fetch a NAR: it may have died

_Record = tuple[str, str, bytes]
"""The upstream's id, the NAR's key, and the narinfo."""


class NarinfoCache:
    def __init__(self, files: DiskCache, nars: DiskCache, clients: Sequence[Client], threads: Threads) -> None:
        self._files = files
        self._nars = nars
        self._by_id = {client.id: client for client in clients}
        self._threads = threads
        self._awaiting_nars: set[str] = set()
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._is_sweep_due = False
        nars.on_removal = self._sweep_soon
        self._sweep_soon()  # a killed process may have left narinfos without NARs

    def add_client(self, client: Client) -> None:
        """Serve the narinfos of one more upstream."""
        self._by_id[client.id] = client

    async def lookup_path(self, hash_part: str) -> RemotePath | None:
        """Return the path with this hash part, or None unless its narinfo is valid and its complete NAR is cached."""
        record = await self._threads.write(self._load, hash_part)
        if record is None:
            return None
        upstream, key, text = record
        client = self._by_id.get(upstream)
        if client is None or client.settings.mode != "proxy":
            return None
        try:
            path = await parse(client, hash_part, text)
        except UpstreamMismatchError:  # logged already
            return None
        return path if path.name.key == key else None

    async def has_narinfo(self, hash_part: str) -> bool:
        """Return True if there is a narinfo for this hash part, valid or not."""
        return await self._threads.write(self._files.has, hash_part)

    async def keep(self, path: RemotePath) -> None:
        """Write the narinfo of a path if its NAR is in the cache, or as soon as another worker has fetched it.

        Does nothing if no worker fetches the NAR, or if the mode of the upstream is not `proxy`.
        Gives up after _MAX_WAIT_S.
        """
        hash_part = path.info.path.hash_part
        if path.client.settings.mode != "proxy" or hash_part in self._awaiting_nars:
            return
        self._awaiting_nars.add(hash_part)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_MAX_WAIT_S):
                    while not await self._threads.write(self._save, path):  # noqa: ASYNC110 (another process fetches it)
                        await asyncio.sleep(_CHECK_INTERVAL_S)
        finally:
            self._awaiting_nars.remove(hash_part)

    def _save(self, path: RemotePath) -> bool:
        """Write the narinfo of a path if its NAR is in the cache. Return False while another process fetches that."""
        key = path.name.key
        if not self._nars.has(key):
            if self._nars.is_growing(key):
                return False
            if not self._nars.has(key):  # it may have been completed in between
                return True
        self.save(path)
        return True

    def save(self, path: RemotePath) -> None:
        """Write the narinfo of a path whose NAR is in the cache. Blocks."""
        client, key, hash_part = path.client, path.name.key, path.info.path.hash_part
        text = narinfo.render(path.info, client.store_dir, replace(path.nar, url=path.url), path.info.sigs).encode()
        if _record(self._files.use_file(hash_part)) != (client.id, key, text):
            self._files.add(hash_part, f"{client.id} {key}\n".encode() + text)

    def _load(self, hash_part: str) -> _Record | None:
        """Return the record of a path, or None if there is none. Removes a narinfo whose NAR was evicted."""
        record = _record(self._files.use_file(hash_part))
        if record is not None and not self._nars.has(record[1]):
            self._files.remove(hash_part)
            return None
        return record

    def _sweep_soon(self) -> None:
        if not self._is_sweep_due:
            self._is_sweep_due = True
            with suppress(RuntimeError):  # the process is ending
                self._sweeper.submit(self._sweep)

    def _sweep(self) -> None:
        """Remove the narinfos whose NARs were evicted."""
        self._is_sweep_due = False
        with suppress(OSError):
            self._files.sweep()
            hash_parts = self._files.keys()
            keys = set(self._nars.keys())  # read after the narinfos, because each narinfo is written after its NAR
            for hash_part in hash_parts:
                record = _record(self._files.find_file(hash_part))
                if record is None or record[1] not in keys:
                    self._files.remove(hash_part)


def open_narinfo_cache(
    settings: Settings, nars: DiskCache, clients: Sequence[Client], threads: Threads
) -> NarinfoCache | None:
    """Open the cache in `cache_dir`. Return None if it cannot be written, which is logged."""
    max_bytes = min(_MAX_BYTES, nars.limit // _NAR_CACHE_SHARE)
    files = open_cache(settings, "narinfo", "narinfos of upstreams", max_bytes, logging.WARNING)
    return None if files is None else NarinfoCache(files, nars, clients, threads)


def read_narinfos(files: DiskCache) -> Iterator[bytes]:
    """Yield the narinfos in `files`. Blocks: for commands, not for servers."""
    for hash_part in files.keys():  # noqa: SIM118 (not a dictionary)
        if (record := _record(files.find_file(hash_part))) is not None:
            yield record[2]


def _record(file: CachedFile | None) -> _Record | None:
    """Return the record in a file, and close the file. Return None if there is no file, or if it is damaged."""
    if file is None:
        return None
    with closing(file), suppress(CacheFileError, OSError):
        if file.size > _RECORD_MAX_BYTES:
            return None
        head, _, text = file.content().partition(b"\n")
        upstream, _, key = head.decode(errors="replace").partition(" ")
        return upstream, key, text
    return None
