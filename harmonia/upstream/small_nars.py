"""Small NARs that are fetched ahead: verified in memory and cached in one step, and taken from memory by a client.

A file that grows in the cache costs a dozen calls in threads and 60 system calls, which take several times as long as
to verify a small NAR. These NARs have no readers before they are complete.
"""

import asyncio
import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

from cachetools import LRUCache

from harmonia.cache.disk_cache import DiskCache
from harmonia.errors import FormatError, UpstreamError
from harmonia.nix.decompress import WindowError
from harmonia.process.threads import Threads
from harmonia.upstream import nar_verifier
from harmonia.upstream.narinfo_cache import NarinfoCache
from harmonia.upstream.refusals import UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.transport import WHOLE

_SMALL_BYTES = 256 << 10  # of the longest file of a small NAR
_MAX_HELD_BYTES = 16 << 20  # of NARs in memory; clients get the others from the cache


@dataclass(frozen=True, slots=True)
class SmallNar:
    """A verified NAR file in memory, and the path that it was fetched for."""

    path: RemotePath
    content: bytes


class SmallNars:
    """The small NARs of a worker."""

    def __init__(self, cache: DiskCache, narinfos: NarinfoCache | None, threads: Threads) -> None:
        self._cache = cache
        self._narinfos = narinfos
        self._threads = threads
        self._running: dict[str, asyncio.Future[None]] = {}
        self._held: MutableMapping[str, SmallNar] = LRUCache(_MAX_HELD_BYTES, getsizeof=lambda nar: len(nar.content))

    async def take(self, key: str) -> SmallNar | None:
        """Return the NAR with this key if it is in memory or being fetched, and forget it. Otherwise, return None."""
        if running := self._running.get(key):
            await asyncio.wait({running})
        return self.take_now(key)

    def take_now(self, key: str) -> SmallNar | None:
        """Like `take`, but return None for a NAR that is being fetched. Does not block."""
        nar = self._held.pop(key, None)
        if nar is not None:
            self._cache.touch(key)  # metadata that was just written: the disk is not read
        return nar

    def forget(self, key: str) -> None:
        """Remove a NAR from memory."""
        self._held.pop(key, None)

    async def fetch(self, path: RemotePath, headers: Mapping[str, str]) -> int | None:
        """Fetch the NAR of a path into memory and the cache. Return its length, or 0 if it is there or coming.

        Returns None if only a transfer can fetch it: the file is too long, unpacking takes much memory, or the download
        broke off. Raises UpstreamMismatchError if the upstream sends another NAR, or does not have it.
        """
        key = path.name.key
        if (path.nar.file_size or path.info.nar_size) > _SMALL_BYTES:
            return None
        if key in self._running:
            return 0
        running = self._running[key] = asyncio.get_running_loop().create_future()
        try:
            if await self._threads.run_short_io(partial(self._cache.has, key)):
                return 0
            content = await _download(path, headers)
            if content is None:
                return None
            await self._threads.unpack(self._keep, path, content)
            self._held[key] = SmallNar(path, content)
        except UpstreamMismatchError:
            raise
        except (UpstreamError, WindowError):
            return None
        except FormatError as error:
            raise path.refuse_nar(error) from None
        else:
            return len(content)
        finally:
            del self._running[key]
            running.set_result(None)

    def _keep(self, path: RemotePath, content: bytes) -> None:
        """Verify a NAR file, and add it and its narinfo to the caches, unless the disk fails.

        Raises FormatError if the file does not contain the NAR, WindowError if unpacking takes much memory.
        """
        sha256 = hashlib.sha256(content).digest()
        if path.nar.compression != "none" or not nar_verifier.has_file_hash(path.info, path.nar, sha256):
            nar_verifier.check_content(path.info, path.nar, [content])
        if self._cache.add(path.name.key, content, sha256):
            self._cache.mark_unused(path.name.key)
            if self._narinfos is not None:
                self._narinfos.save(path)


async def _download(path: RemotePath, headers: Mapping[str, str]) -> bytes | None:
    """Return the NAR file of a path, or None if it is too long. Raises UpstreamError if the download fails."""
    path.client.counters.add("fetches")
    content = bytearray()
    async with await path.request_nar(headers, WHOLE) as response:
        while data := await path.client.read_answer(response, _SMALL_BYTES):
            content += data
            if len(content) > _SMALL_BYTES:
                response.close()
                return None
    path.client.counters.add("fetched_bytes", len(content))
    return bytes(content)
