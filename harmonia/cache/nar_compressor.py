"""Compressed NARs, from complete or growing files of the cache, or compressed while they are sent.

All three have the same bytes, so a download can switch between them at any position.
"""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Generator, MutableMapping
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

from cachetools import TTLCache

from harmonia.cache.disk_cache import NarCache
from harmonia.cache.frame_index import FrameIndex, frame_entry
from harmonia.cache.growing_file import CachedFile, Filler
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_frames import Frame, FrameEncoder, Source, check
from harmonia.config.settings import Zstd
from harmonia.errors import CacheFileError, StoreObjectError
from harmonia.nix import base32
from harmonia.ownership import closed_on_error
from harmonia.store.file_reader import OpenSlice, Step

_UNKNOWN_TTL_S = 1.0  # until the next check whether another process has compressed a NAR
_MAX_FILLS = 256  # NARs that are compressed into the cache at the same time; each has an open file
_MAX_FOREIGN_FILLS = 16  # of the fills, for encodings other than our own
_MAX_KNOWN_FILES = 65536  # remembered hashes and sizes of compressed files, some 200 bytes each

_log = logging.getLogger("harmonia")


class CompressedFile(NamedTuple):
    """The hash and the size of a compressed file, for FileHash and FileSize of a narinfo."""

    sha256: bytes
    size: int
    """In bytes."""


class NarSource(Source, Protocol):
    """A NAR in the store, to be closed."""

    def share(self) -> "NarSource":
        """Return the same NAR for another owner, who closes it as well."""

    def close(self) -> None: ...


class Compressor:
    """The compressor of NARs, with an optional cache."""

    def __init__(self, settings: Zstd, cache: NarCache | None, indexes: NarCache | None = None) -> None:
        """Compress into `cache`, if given. `indexes` is the cache of frame indexes, which stay if files are evicted."""
        self.encoder = FrameEncoder(settings)
        self.cache = cache
        self._indexes = indexes
        self.damaged_nars = 0
        """The number of times that a NAR did not have its registered hash or size."""
        self._fills: Counter[bool] = Counter()
        """The number of NARs in compression into the cache, for our own encoding (True) and for others (False)."""
        self._known: dict[bytes, CompressedFile] = {}  # not from cachetools, because it is read without the lock
        self._unknown: MutableMapping[bytes, None] = TTLCache(_MAX_KNOWN_FILES, _UNKNOWN_TTL_S)
        self._damaged: set[str] = set()
        self._lock = threading.Lock()

    def known_file_info(self, sha256: bytes) -> CompressedFile | None:
        """Return the remembered hash and size of the compressed NAR, or None. They stay valid after an eviction."""
        return self._known.get(sha256)

    def is_certain(self, sha256: bytes) -> bool:
        """Return whether `known_file_info` is current: the file is known, or a lookup in the last second missed it."""
        return sha256 in self._known or sha256 in self._unknown

    def find_file_info(self, sha256: bytes) -> CompressedFile | None:
        """Return the hash and size of the compressed NAR, looked up in the cache if necessary, or None."""
        if (known := self.known_file_info(sha256)) is None and self.cache:
            if file := self.cache.find_file(_key(sha256, self.encoder.encoding)):
                self.remember(sha256, file)
                file.close()
                known = self.known_file_info(sha256)
            elif index := self.load_frame_index(sha256, self.encoder.encoding):
                known = CompressedFile(index.sha256, index.size)
                self._remember(sha256, known)
            else:
                with self._lock:
                    self._unknown[sha256] = None
        return known

    def remember(self, sha256: bytes, file: CachedFile) -> None:
        """Remember the hash and size of the compressed NAR, if its file is complete."""
        if file.sha256 is not None:
            self._remember(sha256, CompressedFile(file.sha256, file.size))

    def _remember(self, sha256: bytes, known: CompressedFile) -> None:
        with self._lock:
            self._known[sha256] = known
            if len(self._known) > _MAX_KNOWN_FILES:
                del self._known[next(iter(self._known))]

    def has_file(self, sha256: bytes) -> bool:
        """Return whether the cache has the complete file."""
        file = self.cache.find_file(_key(sha256, self.encoder.encoding)) if self.cache else None
        if file is None:
            return False
        file.close()
        return True

    def load_frame_index(self, sha256: bytes, encoding: Encoding) -> FrameIndex | None:
        """Return the frame index of a compressed NAR that was in the cache before, or None."""
        file = self._indexes.use_file(_key(sha256, encoding)) if self._indexes else None
        if file is None:
            return None
        with closing(file), suppress(CacheFileError):  # a damaged index was removed
            return FrameIndex.load(b"".join(iter(file.slice(0, file.size).read, b"")))
        return None

    def keep_frame_index(self, sha256: bytes, encoding: Encoding, index: FrameIndex) -> None:
        """Store the frame index of a file, unless the file has at most two frames, which are quickly made again."""
        if self._indexes is None or not index.frames[2:]:
            return
        opened = self._indexes.open_file(_key(sha256, encoding))
        if opened is None:
            return
        file, filler = opened
        file.close()
        if filler is not None:
            try:
                with suppress(OSError):  # the cache logs it
                    filler.append(index.dump())
                    filler.commit()
            finally:
                filler.abandon()  # unless it was committed

    def use_cached_file(self, sha256: bytes, encoding: Encoding) -> CachedFile | None:
        """Return the complete file, or None. It may have an encoding that we cannot make. The caller closes it."""
        return self.cache.use_file(_key(sha256, encoding)) if self.cache else None

    def file_size(self, sha256: bytes, encoding: Encoding) -> int | None:
        """Return the size of the compressed NAR in bytes, or None if it is unknown and not in the cache."""
        if encoding == self.encoder.encoding:
            info = self.find_file_info(sha256)
            return info.size if info else None
        file = self.cache.find_file(_key(sha256, encoding)) if self.cache else None
        if file is None:
            index = self.load_frame_index(sha256, encoding)
            return index.size if index else None
        with closing(file):
            return file.size

    def open_file(self, source: NarSource, encoding: Encoding) -> CachedFile | None:
        """Return the compressed NAR, complete or growing. The caller closes it.

        It grows even if no client reads it, and even after `source` is closed. Returns None if the cache is not
        writable, if the source has no hash, if it was damaged at the last read, or if too many NARs are in compression.
        """
        if not self.cache or not source.sha256:
            return None
        key = _key(source.sha256, encoding)
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

    def count_fill(self, encoding: Encoding, difference: int) -> None:
        """Add to the number of NARs in compression into the cache."""
        with self._lock:
            self._fills[encoding == self.encoder.encoding] += difference

    def mark_damaged(self, source: Source, error: StoreObjectError) -> None:
        """Count a NAR that does not have its registered hash or size, and log it once."""
        with self._lock:
            self.damaged_nars += 1
            is_logged = str(source) in self._damaged
            if len(self._damaged) > _MAX_KNOWN_FILES:
                self._damaged.clear()
            self._damaged.add(str(source))
        if not is_logged:
            _log.error("%s; repair it with nix-store --repair-path, and find others with harmonia verify --all", error)

    def is_damaged(self, source: Source) -> bool:
        """Return whether a NAR did not have its registered hash or size at the last read."""
        return str(source) in self._damaged

    def mark_intact(self, source: Source) -> None:
        """Remember that a NAR is not damaged any more."""
        with self._lock:
            self._damaged.discard(str(source))


def _key(sha256: bytes, encoding: Encoding) -> str:
    return f"{base32.encode(sha256)}.{encoding.name}"


class CompressedNar:
    """The body of a compressed NAR, from the cache, or compressed while it is sent."""

    def __init__(self, compressor: Compressor, source: NarSource, encoding: Encoding | None = None) -> None:
        """Start to fill the cache, if it does not have the file. Block for a moment. By default, use our encoding.

        Closing this body closes `source`.
        """
        self._compressor = compressor
        self._source = source
        self._encoding = encoding or compressor.encoder.encoding
        self._is_ours = self._encoding == compressor.encoder.encoding
        known = compressor.known_file_info(source.sha256) if source.sha256 and self._is_ours else None
        self.size = known.size if known else None
        """The size in bytes, or None until the NAR was compressed to its end."""
        self._index: FrameIndex | None = None
        self._file: CachedFile | None = None
        with closed_on_error(self):
            self._file = self._open()
            if self._file is not None:
                self._look(self._file)
            if source.sha256 and not (self._file and self._file.whole):
                self._index = compressor.load_frame_index(source.sha256, self._encoding)
                if self._index is not None:
                    self.size = self._index.size

    def close(self) -> None:
        self._close_file()
        self._source.close()

    @property
    def is_damaged(self) -> bool:
        """Return whether the NAR did not have its registered hash or size at the last read."""
        return self._compressor.is_damaged(self._source)

    def read(self, start: int, stop: int | None) -> Generator[Step | None]:
        self._file = self._file or self._open()
        position = start
        reopened = False
        try:
            while self._file is not None:
                position = yield from self._catch_up(self._file, position, stop)
                position = yield from self._file.follow(position, stop)
                self._look(self._file)
                if self._file.whole or position == stop:
                    return
                # The filler has died or failed. Take over once. After a second failure, compress without the cache.
                self._close_file()
                self._file = None if reopened else self._open()
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

    def _open(self) -> CachedFile | None:
        return self._compressor.open_file(self._source, self._encoding)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _look(self, file: CachedFile) -> None:
        file.refresh()
        if file.whole and self._source.sha256:
            self.size = file.size
            if self._is_ours:
                self._compressor.remember(self._source.sha256, file)


class CachedNar:
    """The body of a complete file of the cache, whose encoding this server may be unable to make."""

    def __init__(self, file: CachedFile) -> None:
        self.size = file.size
        self._file = file

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
            self._compressor.keep_frame_index(self._source.sha256, self._encoding, index)
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
