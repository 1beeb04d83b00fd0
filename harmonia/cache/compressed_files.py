"""Compressed files of NARs in the cache, and their hash, size and frame index, which outlive an eviction."""

import threading
from contextlib import closing, suppress
from typing import NamedTuple

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.frame_index import FrameIndex
from harmonia.cache.growing_file import CachedFile
from harmonia.cache.zstd import Encoding
from harmonia.errors import CacheFileError
from harmonia.nix import base32

_MAX_KNOWN_FILES = 65536  # remembered hashes and sizes of compressed files, some 200 bytes each


class CompressedFile(NamedTuple):
    """The hash and the size of a compressed file, for FileHash and FileSize of a narinfo."""

    sha256: bytes
    size: int
    """In bytes."""


class CompressedFiles:
    """The compressed files of NARs, in the cache or remembered. NARs are named by their hash."""

    def __init__(self, encoding: Encoding, cache: DiskCache | None, indexes: DiskCache | None) -> None:
        """Look files up in `cache`, if given. `encoding` is our own encoding. `indexes` has the frame indexes."""
        self._encoding = encoding
        self._cache = cache
        self._indexes = indexes
        self._known_files: dict[bytes, CompressedFile] = {}  # not from cachetools, because it is read without the lock
        self._lock = threading.Lock()

    def known_file_info(self, sha256: bytes) -> CompressedFile | None:
        """Return the remembered hash and size of the compressed NAR, or None. They stay valid after an eviction."""
        return self._known_files.get(sha256)

    def find_file_info(self, sha256: bytes) -> CompressedFile | None:
        """Return the hash and size of the compressed NAR, looked up in the cache if necessary, or None."""
        if (info := self.known_file_info(sha256)) is None and self._cache:
            if file := self._cache.find_file(file_key(sha256, self._encoding)):
                self.remember_file(sha256, file)
                file.close()
                info = self.known_file_info(sha256)
            elif index := self.load_frame_index(sha256, self._encoding):
                info = CompressedFile(index.sha256, index.size)
                self.remember(sha256, info)
        return info

    def remember_file(self, sha256: bytes, file: CachedFile) -> None:
        """Remember the hash and size of the compressed NAR, if its file is complete."""
        if file.sha256 is not None:
            self.remember(sha256, CompressedFile(file.sha256, file.size))

    def remember(self, sha256: bytes, info: CompressedFile) -> None:
        """Remember the hash and size of the compressed NAR."""
        with self._lock:
            self._known_files[sha256] = info
            if len(self._known_files) > _MAX_KNOWN_FILES:
                del self._known_files[next(iter(self._known_files))]

    def has_file(self, sha256: bytes) -> bool:
        """Return True if the cache has the complete file."""
        return self._cache is not None and self._cache.has(file_key(sha256, self._encoding))

    def load_frame_index(self, sha256: bytes, encoding: Encoding) -> FrameIndex | None:
        """Return the frame index of a compressed NAR that was in the cache before, or None."""
        file = self._indexes.use_file(file_key(sha256, encoding)) if self._indexes else None
        if file is None:
            return None
        with closing(file), suppress(CacheFileError):  # a damaged index was removed
            return FrameIndex.load(file.content())
        return None

    def keep_frame_index(self, sha256: bytes, encoding: Encoding, index: FrameIndex) -> None:
        """Store the frame index of a file, unless the file has at most two frames, which are quickly made again."""
        if self._indexes is not None and index.frames[2:]:
            self._indexes.write_file(file_key(sha256, encoding), lambda: [index.dump()])

    def use_cached_file(self, sha256: bytes, encoding: Encoding) -> CachedFile | None:
        """Return the complete file, or None. It may have an encoding that we cannot make. The caller closes it."""
        return self._cache.use_file(file_key(sha256, encoding)) if self._cache else None

    def file_size(self, sha256: bytes, encoding: Encoding) -> int | None:
        """Return the size of the compressed NAR in bytes, or None if it is unknown and not in the cache."""
        if encoding == self._encoding:
            info = self.find_file_info(sha256)
            return info.size if info else None
        file = self._cache.find_file(file_key(sha256, encoding)) if self._cache else None
        if file is None:
            index = self.load_frame_index(sha256, encoding)
            return index.size if index else None
        with closing(file):
            return file.size

    def read_file(self, sha256: bytes, encoding: Encoding) -> bytes | None:
        """Return the content of a complete file that fits into memory, or None if the cache does not have it.

        Raises CacheFileError if the file is damaged.
        """
        file = self.use_cached_file(sha256, encoding)
        if file is None:
            return None
        with closing(file):
            if encoding == self._encoding:
                self.remember_file(sha256, file)
            return file.content()


def file_key(sha256: bytes, encoding: Encoding) -> str:
    """Return the key of a compressed NAR in the cache."""
    return f"{base32.encode(sha256)}.{encoding.name}"
