"""Compressed NARs, from complete or growing files of the cache, or compressed while they are sent.

All three have the same bytes, so a download can switch between them at any position.
"""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Protocol

from cachetools import RRCache

from harmonia.cache.compressed_files import CompressedFile, CompressedFiles, file_key
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.frame_index import FrameIndex, frame_entry
from harmonia.cache.growing_file import CachedFile, Filler
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_frames import Frame, FrameEncoder, Source, check
from harmonia.config.tables.zstd import Zstd
from harmonia.errors import StoreObjectError
from harmonia.ownership import closed_on_error
from harmonia.process.fair_executor import FairExecutor
from harmonia.process.loop_reads import finish
from harmonia.store.file_reader import OpenSlice, Step

_MAX_FILLS = 256  # NARs that are compressed into the cache at the same time; each has an open file
_MAX_FOREIGN_FILLS = 16  # of the fills, for encodings other than our own
_MAX_DAMAGED = 65536  # remembered damaged NARs
_SMALL_NAR_THREADS = 2
_MAX_SMALL_BYTES = 32 << 20  # compressed small NARs in memory, which a cached response shares

_log = logging.getLogger("harmonia")


class NarSource(Source, Protocol):
    """A NAR in the store, to be closed."""

    def share(self) -> "NarSource":
        """Return the same NAR for another owner, who closes it as well."""

    def close(self) -> None: ...


class SmallNar(NarSource, Protocol):
    """A NAR that fits into memory."""

    def read_whole(self) -> Generator[None, None, bytes]:
        """Return all bytes. Yields often, so that the caller can do other work.

        Raises StoreObjectError if the NAR does not have its registered size and hash.
        """


class Compressor:
    """The compressor of NARs, with an optional cache."""

    def __init__(self, settings: Zstd, cache: DiskCache | None, indexes: DiskCache | None = None) -> None:
        """Compress into `cache`, if given. `indexes` is the cache of frame indexes, which stay if files are evicted."""
        self.encoder = FrameEncoder(settings)
        self.small_nars = FairExecutor(_SMALL_NAR_THREADS, _SMALL_NAR_THREADS, "zstd-small")
        """Threads for small NARs, for which clients wait. They have the normal priority."""
        self.cache = cache
        self.files = CompressedFiles(self.encoder.encoding, cache, indexes)
        self._small: RRCache[bytes, bytes] = RRCache(_MAX_SMALL_BYTES, getsizeof=len)
        """Small compressed NARs by NAR hash. A random one is evicted: clients request closures in the same order."""
        self.on_compressed: Callable[[Source, int], object] = lambda source, size: None  # noqa: ARG005 (names for readers)
        """Callback after a NAR was compressed, with the bytes of its file. It must return quickly."""
        self.damaged_nars = 0
        """The number of times that a NAR did not have its registered hash or size."""
        self._fills: Counter[bool] = Counter()
        """The number of NARs in compression into the cache, for our own encoding (True) and for others (False)."""
        self._damaged: set[str] = set()
        self._lock = threading.Lock()

    def open_file(self, source: NarSource, encoding: Encoding) -> CachedFile | None:
        """Return the compressed NAR, complete or growing. The caller closes it.

        It grows even if no client reads it, and even after `source` is closed. Returns None if the cache is not
        writable or the source has no hash. If the NAR was damaged at the last read, or too many NARs are in
        compression, returns the complete file if the cache has it, otherwise None.
        """
        if not self.cache or not source.sha256:
            return None
        key = file_key(source.sha256, encoding)
        is_ours = encoding == self.encoder.encoding
        most = _MAX_FILLS if is_ours else _MAX_FOREIGN_FILLS
        if self._fills[is_ours] >= most or self.is_damaged(source):
            return self.cache.use_file(key)
        opened = self.cache.open_file(key)
        if opened is None:
            return None
        file, filler = opened
        if filler is not None:
            _Fill(self, source.share(), encoding, filler).start()
        return file

    def read_small(self, source: SmallNar) -> Generator[None, None, bytes]:
        """Return all bytes of a NAR that fits into memory. Raises StoreObjectError if it is damaged."""
        try:
            content = yield from source.read_whole()
        except StoreObjectError as error:
            self.mark_damaged(source, error)
            raise
        self.mark_intact(source)
        return content

    def compress_small(self, source: SmallNar, content: bytes | None) -> bytes:
        """Compress a NAR that fits into memory, and return the compressed bytes. Read its content if it is None.

        Keep them in memory. The second time, add them to the cache: to create a file takes longer than to compress a
        small NAR, and most that are requested again soon are in memory. If two processes add the same file, both write
        the same bytes.
        """
        sha256 = source.sha256
        assert sha256 is not None  # noqa: S101 (only NARs are compressed here)
        compressed = self.encoder.compress(finish(self.read_small(source)) if content is None else content)
        is_first = self.files.known_file_info(sha256) is None
        if self.cache and not is_first:
            self.cache.add(file_key(sha256, self.encoder.encoding), compressed)
        self.files.remember(sha256, CompressedFile(hashlib.sha256(compressed).digest(), len(compressed)))
        with self._lock, suppress(ValueError):  # larger than the limit
            self._small[sha256] = compressed
        if is_first:
            self.on_compressed(source, len(compressed))
        return compressed

    def small_in_memory(self, sha256: bytes) -> bytes | None:
        """Return a small NAR in our own encoding, if it was compressed before and is still in memory."""
        with self._lock:
            compressed: bytes | None = self._small.get(sha256)  # older cachetools have no types
            return compressed

    def count_fill(self, encoding: Encoding, difference: int) -> None:
        """Add `difference` to the number of NARs now compressed into the cache, in our encoding or in others."""
        with self._lock:
            self._fills[encoding == self.encoder.encoding] += difference

    def mark_damaged(self, source: Source, error: StoreObjectError) -> None:
        """Count a NAR that does not have its registered hash or size, and log it once."""
        with self._lock:
            self.damaged_nars += 1
            is_logged = str(source) in self._damaged
            if len(self._damaged) > _MAX_DAMAGED:
                self._damaged.clear()
            self._damaged.add(str(source))
        if not is_logged:
            _log.error("%s; repair it with nix-store --repair-path, and find others with harmonia verify --all", error)

    def is_damaged(self, source: Source) -> bool:
        """Return True if a NAR did not have its registered hash or size at the last read."""
        return str(source) in self._damaged

    def mark_intact(self, source: Source) -> None:
        """Remember that a NAR is not damaged any more."""
        with self._lock:
            self._damaged.discard(str(source))


class CompressedNar:
    """The body of a compressed NAR, from the cache, or compressed while it is sent."""

    def __init__(self, compressor: Compressor, source: NarSource, encoding: Encoding | None = None) -> None:
        """Start to fill the cache, if it does not have the file. Blocks for a moment. By default, use our encoding.

        Closing this body closes `source`.
        """
        self._compressor = compressor
        self._source = source
        self._encoding = encoding or compressor.encoder.encoding
        self._is_ours = self._encoding == compressor.encoder.encoding
        info = compressor.files.known_file_info(source.sha256) if source.sha256 and self._is_ours else None
        self.size = info.size if info else None
        """The size in bytes, or None until the NAR was compressed to its end."""
        self._index: FrameIndex | None = None
        self._file: CachedFile | None = None
        self.was_complete = False
        """True if the cache had the complete file when this body was opened."""
        with closed_on_error(self):
            self._file = self._open_file()
            if self._file is not None:
                self.was_complete = self._file.whole
                self._note_size(self._file)
            if source.sha256 and not (self._file and self._file.whole):
                self._index = compressor.files.load_frame_index(source.sha256, self._encoding)
                if self._index is not None:
                    self.size = self._index.size

    def close(self) -> None:
        self._close_file()
        self._source.close()

    @property
    def is_damaged(self) -> bool:
        """Return True if the NAR did not have its registered hash or size at the last read."""
        return self._compressor.is_damaged(self._source)

    @property
    def is_in_cache(self) -> bool:
        """Return True if the cache has the file, complete or growing."""
        return self._file is not None

    @property
    def cached_name(self) -> str | None:
        """The name of the file in the cache that other programs may send in place of this body, or None."""
        return None if self._file is None else self._file.sendable_name

    @property
    def reads_briefly(self) -> bool:
        """True if the file is complete: then `read` only opens it."""
        return self._file is not None and self._file.whole

    def read(self, start: int, stop: int | None) -> Generator[Step | None]:
        self._file = self._file or self._open_file()
        position = start
        reopened = False
        try:
            while self._file is not None:
                position = yield from self._catch_up(self._file, position, stop)
                position = yield from self._file.follow(position, stop)
                self._note_size(self._file)
                if self._file.whole or position == stop:
                    return
                # The filler has died or failed. Take over once. After a second failure, compress without the cache.
                self._close_file()
                self._file = None if reopened else self._open_file()
                reopened = True
            begun = position
            reached = yield from self._compressor.encoder.stream(
                self._source, position, stop, self._encoding, self._index
            )
            if stop in {None, self.size}:
                self.size = reached
                if not begun or self._index is None:  # all of the NAR was read
                    self._compressor.mark_intact(self._source)
        except StoreObjectError as error:
            if self._file is None:  # otherwise the file in the cache is at fault
                self._compressor.mark_damaged(self._source, error)
            raise

    def _catch_up(self, file: CachedFile, position: int, stop: int | None) -> Generator[bytes | Future[Any], None, int]:
        """Compress frame by frame from `position` on, until the growing file contains the next byte."""
        index = self._index
        if index is None:
            return position
        first_end, end = index.frames[0][0], index.size if stop is None else stop
        while first_end <= position < end:
            file.refresh()
            if file.whole or file.size > position:
                break
            until = min(index.frame_end(position), end)
            reached = yield from self._compressor.encoder.stream(self._source, position, until, self._encoding, index)
            position = min(reached, until)  # the last frame may end after the range
        return position

    def _open_file(self) -> CachedFile | None:
        return self._compressor.open_file(self._source, self._encoding)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _note_size(self, file: CachedFile) -> None:
        file.refresh()
        if file.whole and self._source.sha256:
            self.size = file.size
            if self._is_ours:
                self._compressor.files.remember_file(self._source.sha256, file)


class CachedNar:
    """The body of a complete file of the cache, whose encoding this server may be unable to make."""

    def __init__(self, file: CachedFile) -> None:
        self.size = file.size
        self._file = file
        self.cached_name = file.sendable_name

    def close(self) -> None:
        self._file.close()

    def read(self, start: int, stop: int | None) -> Generator[OpenSlice | None]:
        yield from self._file.follow(start, stop)


class _Fill:
    """The fill of a file of the cache, the owner of the source and of the filler.

    Each thread that has compressed a frame writes all frames that are next.
    """

    def __init__(self, compressor: Compressor, source: NarSource, encoding: Encoding, filler: Filler) -> None:
        self._compressor = compressor
        self._encoder = compressor.encoder
        self._source = source
        self._encoding = encoding
        self._filler = filler
        self._sha256 = hashlib.sha256()
        self._offsets = encoding.offsets(source.size)  # of the frames that are not submitted yet
        self._written = 0  # length of the content whose frames are written
        self._entries: list[tuple[int, bytes]] = []  # of the frame index
        self._ready: dict[int, Frame] = {}  # frames that wait for an earlier one, by offset
        self._over = False
        self._lock = threading.Lock()

    def start(self) -> None:
        self._compressor.count_fill(self._encoding, 1)
        self._submit(self._encoder.threads + 1)  # one more than threads, so that no thread becomes idle

    def _submit(self, frames: int) -> None:
        with self._lock:  # several threads come here, and only one at a time may advance a generator
            offsets = [*islice(self._offsets, frames)]
        try:
            for offset in offsets:
                self._encoder.submit(self._source, offset, self._encoding).add_done_callback(
                    partial(self._done, offset)
                )
        except RuntimeError as error:
            with self._lock:
                self._give_up(error)

    def _done(self, offset: int, future: Future[Frame]) -> None:
        written = 0
        with self._lock:
            if self._over:
                return
            if (failure := future.exception()) is not None:
                self._give_up(failure)  # to raise it here would make a reference cycle with the future
                return
            try:
                self._ready[offset] = future.result()
                while frame := self._ready.pop(self._written, None):
                    self._write(frame)
                    written += 1
            except Exception as error:  # noqa: BLE001 (nothing else reports it)
                self._give_up(error)
                return
        self._submit(written)  # as many as were written, to bound the frames that wait for a slow one

    def _write(self, frame: Frame) -> None:
        self._sha256.update(frame.content)
        self._written += len(frame.content)
        self._encoder.release(frame)
        whole = self._written == self._source.size
        if whole:
            check(self._source, self._sha256.digest())
        self._filler.append(frame.compressed)
        self._entries.append(frame_entry(frame.compressed))
        if whole:
            self._filler.commit()
            assert self._source.sha256 is not None  # noqa: S101 (the key of the file contains it)
            index = FrameIndex(self._filler.sha256, self._entries)
            self._compressor.files.keep_frame_index(self._source.sha256, self._encoding, index)
            self._compressor.on_compressed(self._source, self._filler.size)
            self._end()

    def _give_up(self, error: BaseException) -> None:
        if self._over:
            return
        self._end()
        if isinstance(error, StoreObjectError):
            self._compressor.mark_damaged(self._source, error)
        elif not isinstance(error, OSError):  # the cache logs an OSError, or the next read of the source raises it
            cause = str(error) or type(error).__name__
            _log.error("cannot compress %s into the cache: %s; later requests try again", self._source, cause)
        self._filler.abandon()  # last: now readers try again, and find the NAR marked as damaged

    def _end(self) -> None:
        self._over = True
        self._source.close()
        self._compressor.count_fill(self._encoding, -1)
