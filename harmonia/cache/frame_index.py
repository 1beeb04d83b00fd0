"""Frame index of a compressed file: size and digest of each frame.

The index stays after the file was evicted, so that single frames can be compressed again for a resumed download.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import xxhash

from harmonia.cache.disk_cache import DiskCache, open_cache
from harmonia.config.settings import Settings
from harmonia.errors import StoreObjectError

_FILES_BYTES = 64 << 20
"""Maximum disk space of all indexes. Each needs 4 KiB, or 16 bytes for each frame of 8 MiB if that is more."""
_HASH_BYTES = 32
_FRAME = struct.Struct("<Q8s")


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """The frame index of a compressed file."""

    sha256: bytes
    """The SHA-256 of the file."""
    frames: Sequence[tuple[int, bytes]]
    """The size in bytes of each frame, and the XXH3-64 of its bytes."""

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return sum(size for size, _ in self.frames)

    def frame_end(self, position: int) -> int:
        """Return the end of the frame that contains the byte at `position`."""
        return next(end for end in accumulate(size for size, _ in self.frames) if end > position)

    def check(self, number: int, frame: bytes) -> None:
        """Raise StoreObjectError if the frame differs from the one in the index."""
        if frame_entry(frame) != self.frames[number]:
            raise StoreObjectError(f"frame {number} of the compressed NAR differs from its index")

    def dump(self) -> bytes:
        """Return the index as bytes."""
        return self.sha256 + b"".join(_FRAME.pack(*frame) for frame in self.frames)

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Return the index in the bytes from `dump`."""
        return cls(data[:_HASH_BYTES], tuple(_FRAME.iter_unpack(data[_HASH_BYTES:])))


def frame_entry(frame: bytes) -> tuple[int, bytes]:
    """Return the entry of a frame in an index: its size and digest."""
    return len(frame), xxhash.xxh3_64_digest(frame)


def index_files(settings: Settings) -> DiskCache | None:
    """Return the cache of index files in `cache_dir`, or None if the directory is not writable."""
    return open_cache(settings, "frames", "frame indexes of compressed NARs", _FILES_BYTES)
