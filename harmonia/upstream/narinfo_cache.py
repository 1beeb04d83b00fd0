"""Cache of narinfos on disk, for paths whose NARs are in the NAR cache: such a path can be had without its upstream.

A file is named by the hash part of its path. Its first line holds the id of the upstream and the key of the NAR; the
narinfo follows. It is trusted no more than the upstream: whenever it is read, it passes the checks of a narinfo that
has just arrived, against the settings of today.
"""

import logging
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace

from harmonia.cache.disk_cache import NarCache, open_cache
from harmonia.cache.growing_file import CachedFile
from harmonia.config.settings import Settings
from harmonia.errors import CacheFileError
from harmonia.nix import narinfo
from harmonia.upstream.client import Client
from harmonia.upstream.refusals import UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath, parse
from harmonia.upstream.tasks import FetchThreads

_MAX_BYTES = 256 << 20  # on disk: 64,000 narinfos
_NAR_CACHE_SHARE = 8  # of a small NAR cache's limit: one part in so many
_RECORD_MAX_BYTES = 4 << 20

_Record = tuple[str, str, bytes]
"""The upstream's id, the NAR's key, and the narinfo."""


class NarinfoCache:
    def __init__(self, files: NarCache, nars: NarCache, clients: Sequence[Client], threads: FetchThreads) -> None:
        self._files = files
        self._nars = nars
        self._by_id = {client.id: client for client in clients}
        self._threads = threads
        self._is_sweep_due = False
        nars.removed = self._sweep_soon
        self._sweep_soon()  # a process that was killed may have left narinfos without NARs

    async def lookup_path(self, hash_part: str) -> RemotePath | None:
        """Return the path with this hash part, if its narinfo is valid and its NAR whole in the cache."""
        record = await self._threads.write(self._load, hash_part)
        if record is None:
            return None
        upstream, key, text = record
        client = self._by_id.get(upstream)
        if client is None or client.settings.mode != "proxy":
            return None
        try:
            found = await parse(client, hash_part, text)
        except UpstreamMismatchError:  # which is logged
            return None
        return found if found.name.key == key else None

    async def has_narinfo(self, hash_part: str) -> bool:
        """Return whether there is a narinfo, valid or not."""
        return await self._threads.write(self._files.has, hash_part)

    async def keep(self, found: RemotePath) -> None:
        await self._threads.sync(self.save, found)

    def save(self, found: RemotePath) -> None:
        """Write the narinfo of a path if its NAR is in the cache. Waits for the disk."""
        client, key, hash_part = found.client, found.name.key, found.info.path.hash_part
        if client.settings.mode != "proxy" or not self._nars.has(key):
            return
        text = narinfo.render(found.info, client.store_dir, replace(found.nar, url=found.url), found.info.sigs).encode()
        if _record(self._files.use_file(hash_part)) == (client.id, key, text):
            return
        self._files.remove(hash_part)
        opened = self._files.open_file(hash_part)
        if opened is None or opened[1] is None:  # the disk does not let us, or another worker writes it
            return
        filler = opened[1]
        try:
            filler.append(f"{client.id} {key}\n".encode() + text)
            filler.commit()
        except OSError:  # the cache has logged it
            filler.abandon()

    def _load(self, hash_part: str) -> _Record | None:
        """Return what is kept of a path. Removes a narinfo whose NAR is gone."""
        record = _record(self._files.use_file(hash_part))
        if record is not None and not self._nars.has(record[1]):
            self._files.remove(hash_part)
            return None
        return record

    def _sweep_soon(self) -> None:
        if not self._is_sweep_due:
            self._is_sweep_due = True
            with suppress(RuntimeError):  # the process is about to end
                self._nars.housekeeping.submit(self._sweep)

    def _sweep(self) -> None:
        """Remove the narinfos whose NARs are gone."""
        self._is_sweep_due = False
        with suppress(OSError):
            self._files.sweep()
            hash_parts = self._files.keys()
            keys = set(self._nars.keys())  # after the narinfos, each of which is written after its NAR
            for hash_part in hash_parts:
                record = _record(self._files.find_file(hash_part))
                if record is None or record[1] not in keys:
                    self._files.remove(hash_part)


def open_narinfo_cache(
    settings: Settings, nars: NarCache, clients: Sequence[Client], threads: FetchThreads
) -> NarinfoCache | None:
    """Return the cache of narinfos in `cache_dir`, or None if it cannot be written."""
    max_bytes = min(_MAX_BYTES, nars.limit // _NAR_CACHE_SHARE)
    files = open_cache(settings, "narinfo", "narinfos of upstreams", max_bytes, logging.WARNING)
    return None if files is None else NarinfoCache(files, nars, clients, threads)


def _record(file: CachedFile | None) -> _Record | None:
    """Return what a file holds, and close it. None if there is none, or if it is damaged."""
    if file is None or file.size > _RECORD_MAX_BYTES:
        return None
    with closing(file), suppress(CacheFileError, OSError):
        head, _, text = file.slice(0, file.size).read(file.size).partition(b"\n")
        upstream, _, key = head.decode(errors="replace").partition(" ")
        return upstream, key, text
    return None
