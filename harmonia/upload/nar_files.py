"""Compressed files of NARs to upload: from the server's cache if it has them, otherwise compressed here.

A small NAR is compressed in memory. A larger one is compressed into a file in a directory of our own, which is removed
after the upload, so that uploads never evict files that clients of the server use.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack

from harmonia.cache.compressed_files import file_key
from harmonia.cache.disk_cache import DiskCache, is_bare
from harmonia.cache.growing_file import CachedFile
from harmonia.cache.layout_cache import Layouts
from harmonia.cache.nar_compressor import Compressor
from harmonia.config.settings import Settings
from harmonia.errors import StoreObjectError
from harmonia.nix import base32
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.ownership import closed_on_error
from harmonia.process.loop_reads import finish
from harmonia.store.file_reader import CHUNK_BYTES
from harmonia.store.store_nar import StoreNar
from harmonia.upload import scratch

_SMALL_NAR_BYTES = 1 << 20
"""Size up to which a NAR is compressed in memory."""
_MIN_POLL_S = 0.002  # until the next look at a file that is being compressed; doubled each time
_MAX_POLL_S = 0.05
_NO_LIMIT = 1 << 62


class CompressedBody:
    """A compressed NAR. The owner closes it."""

    def __init__(self, content: bytes | CachedFile) -> None:
        """Take the ownership of a complete file, or content in memory."""
        self._content = content
        self._reading: asyncio.Future[bytes] | None = None
        if isinstance(content, bytes):
            self.size, sha256 = len(content), hashlib.sha256(content).digest()
        else:
            assert content.sha256 is not None  # noqa: S101 (the file is complete)
            self.size, sha256 = content.size, content.sha256
        self.file = NarFile(f"nar/{base32.encode(sha256)}.nar.zst", "zstd", sha256, self.size)
        """The file as the narinfo describes it."""

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the content. Raises CacheFileError if the file is damaged."""
        if isinstance(self._content, bytes):
            yield self._content
            return
        part = self._content.slice(0, self.size)
        loop = asyncio.get_running_loop()
        while True:
            self._reading = loop.run_in_executor(None, part.read, CHUNK_BYTES)
            if not (data := await asyncio.shield(self._reading)):
                return
            yield bytes(data)

    def close(self) -> None:
        """Close the file. If a thread still reads it for an upload that was cancelled, close it after that."""
        if self._reading is None or self._reading.done():
            self._close()
        else:
            self._reading.add_done_callback(self._close)

    def _close(self, reading: asyncio.Future[bytes] | None = None) -> None:
        if reading is not None:
            reading.exception()  # otherwise asyncio logs it
        if isinstance(self._content, CachedFile):
            self._content.close()


class NarFiles:
    """The compressed files of the NARs of a store."""

    def __init__(self, settings: Settings, real_dir: str, directory: str | None = None) -> None:
        """Compress large NARs into `directory`, or into a new directory of $TMPDIR.

        Raises OSError if the directory cannot be written to.
        """
        self._real_dir = real_dir
        self._layouts = Layouts()
        with ExitStack() as stack:
            if directory is None:
                directory = stack.enter_context(scratch.directory())
            self._scratch = DiskCache(os.path.join(directory, "nar"), _NO_LIMIT)
            self._stack = stack.pop_all()
        for key in self._scratch.keys():  # noqa: SIM118 (not a dictionary): of interrupted uploads
            self._scratch.remove(key)
        self._scratch.sweep()
        self._compressor = Compressor(settings.zstd, self._scratch)
        self._cache = _server_cache(settings)

    async def open_file(self, info: PathInfo) -> CompressedBody:
        """Return the compressed NAR of a path. The caller closes it.

        Raises StoreObjectError if the store object is damaged or was garbage-collected, OSError if it cannot be read or
        the disk is full.
        """
        key = file_key(info.nar_hash, self._compressor.encoder.encoding)
        if self._cache and (cached := await asyncio.to_thread(self._cache.use_file, key)):
            return CompressedBody(cached)
        nar = StoreNar(info, os.fsencode(f"{self._real_dir}/{info.path}"), self._layouts)
        if info.nar_size <= _SMALL_NAR_BYTES:
            return CompressedBody(await asyncio.to_thread(self._compress_small, nar))
        file = await asyncio.to_thread(self._compressor.open_file, nar, self._compressor.encoder.encoding)
        if file is None:
            raise OSError("cannot compress NARs: the disk is full, or not writable; see the log above")
        with closed_on_error(file):
            await self._completed(nar, file, key)
            self._scratch.remove(key)
        return CompressedBody(file)

    def _compress_small(self, nar: StoreNar) -> bytes:
        return self._compressor.encoder.compress(finish(nar.read_whole()))

    async def _completed(self, nar: StoreNar, file: CachedFile, key: str) -> None:
        """Wait until a growing file is complete and has its final name."""
        poll_s = _MIN_POLL_S
        while True:
            file.refresh()
            if file.whole and not self._scratch.is_growing(key):
                return
            if file.lock():  # no thread writes or renames it any more
                file.refresh()
                if file.whole:
                    return
                raise self._failure(nar)
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)

    def _failure(self, nar: StoreNar) -> Exception:
        if self._compressor.is_damaged(nar):
            self._compressor.mark_intact(nar)  # the next attempt reads it again
        elif os.path.lexists(nar.root):
            return OSError(f"cannot compress {nar}: the disk is full, or a file cannot be read; see the log above")
        return StoreObjectError(f"{nar} is damaged, or was garbage-collected")

    def close(self) -> None:
        """Remove the directory, unless it was given."""
        self._stack.close()


def _server_cache(settings: Settings) -> DiskCache | None:
    """Return the server's cache of compressed NARs if this user may use it, which must not create it."""
    directory = os.path.join(str(settings.cache_dir), "nar")
    try:
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            return None
        # Not `nginx_location`: the settings of this command may be other ones than those of the server.
        return DiskCache(directory, _NO_LIMIT, bare=is_bare(directory))
    except OSError:
        return None
